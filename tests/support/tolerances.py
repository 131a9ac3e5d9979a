"""The tolerances of the suite: one table, each with its reason."""

FLOAT32 = 1e-6
"""float32 results, share of the output's scale. Three roundings of half an ulp (6e-8 each) at the output, and the error
of the mean (float32 sums over blocks of 512 around a near shift: about 2e-7 of a standard deviation)."""

FLOAT32_HARD = 2e-6
"""float32 results on data that break the usual formulas: mean 1e6 with std 1, outliers, sorted input. Rounding is
allowed (measured: 3e-7), cancellation is not: it would show as 1e-4 and more."""

FLOAT64 = 1e-12
"""float64 results on well-conditioned data, share of the output's scale: sums of up to 1e5 terms at 1e-16 each."""

FLOAT64_TORCH = 1e-9
"""float64 results against torch's, relative. Both round at 1e-16; eps 1e-5 and means of the size of the standard
deviation amplify that by less than 1e5."""

FLOAT64_TORCH_ZERO = 1e-11
"""Beside FLOAT64_TORCH, absolute, for outputs that cancel to nearly zero."""

STATISTICS_FLOAT32 = 1e-6
"""mean (in standard deviations) and rstd (relative) of float32 input: sums over blocks run in float32."""

STATISTICS_FLOAT64 = 1e-12
"""mean (in standard deviations) and rstd (relative) of float64 input."""

MOMENTS = 1e-12
"""Moments of float64 data in any split, relative to longdouble: merging adds a few roundings of 1e-16."""

ONNX_RTOL, ONNX_ATOL = 1e-4, 1e-6
"""The ONNX cases hold float32 outputs of float32 arithmetic: a float64 reference differs from them by up to 2.3e-5."""

RUNNING_FLOAT32 = 1e-6
"""float32 running statistics: one rounding (6e-8) beside the batch's statistics."""

NIST_DIGITS = {
    "Lew": 13.0,
    "Lottery": 13.0,
    "Mavro": 12.5,
    "NumAcc1": 15.0,
    "NumAcc2": 13.0,
    "NumAcc3": 9.4,
    "NumAcc4": 8.2,
}
"""Correct digits (log relative error) of the standard deviation against NIST's certified value. The data round to
float64 first, which alone leaves 9.5 digits of NumAcc3, 8.25 of NumAcc4 and 13.1 of Mavro."""

NIST_OWN_DIGITS = {
    "Lew": 14.5,
    "Lottery": 14.5,
    "Mavro": 13.5,
    "NumAcc1": 15.0,
    "NumAcc2": 14.5,
    "NumAcc3": 10.5,
    "NumAcc4": 9.5,
}
"""Correct digits of the standard deviation against the exact one of the rounded data. The means that merge are float64:
half an ulp of 1e7 is 1e-8 of NumAcc4's standard deviation, times the small difference between two blocks' means."""

IMPORT_SECONDS = 0.030
"""What `import numbanorm` may cost beside `import numba`."""
