"""Clusters: blocks that run at the same time on neighbouring multiprocessors, and wait for each other."""

from __future__ import annotations

from .toolchain import intrinsic, ir, types


def _inline_assembly(instructions):
    """Return a function without arguments that is a few instructions, which memory accesses do not pass."""

    @intrinsic
    def tell(typing_context):
        def generate(context, builder, signature, arguments):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(ir.InlineAsm(kind, instructions, "~{memory}", side_effect=True), [])
            return context.get_dummy_value()

        return types.none(), generate

    return tell


show_to_cluster = _inline_assembly("fence.acq_rel.cluster;")
"""Let what this thread has written be seen by the blocks of its cluster, once they have waited for each other."""

wait_for_cluster = _inline_assembly("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;")
"""Wait until all threads of the cluster have come so far. To arrive shows nothing of what was written: that would let
every thread wait until all that it wrote, results too, is in L2."""
