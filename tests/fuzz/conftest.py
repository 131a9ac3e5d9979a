"""The fuzzer's own modules are no tests."""

collect_ignore = ["check.py", "draws.py", "guarded.py", "judge.py", "run.py", "wrong.py"]
