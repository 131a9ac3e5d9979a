"""The tolerances of the tests about gradients and half precision, each with its reason."""

GRADIENT_FLOAT64 = 1e-10
"""float64 dx and float64 sums against torch's, share of the gradient's scale: both round at 1e-16, which eps 1e-5 and
means of 30 standard deviations amplify by less than 1e5."""

GRADIENT_FLOAT32 = 2e-6
"""float32 dx, share of its scale: five roundings of half an ulp (6e-8 each) and two averages from float32 sums."""

SUM_FLOAT32 = 1e-6
"""float32 dweight and dbias of M terms, share of the largest term, times the root of M: roundings of random sign."""

SUM_OF_EQUALS = 1e-6
"""float32 sums of equal terms, relative: these round the same way every time, 6e-7 after the 64 additions that may stay
in float32 (for terms of 0.1), but 4e-6 after 500 and 1e-5 after 1000."""

FINITE_DIFFERENCES = 1e-7
"""float64 central differences with step 1e-5, share of the gradient's scale: 1e-10 of the step's square, 1e-11 of
rounding, amplified by a loss of some hundred terms."""

HALF_ULPS = 1
"""Half precision against the exact result rounded once, in units in the last place: kernels compute in float32, and
where the exact result is next to a tie between two neighbours the float32 error of 1e-6 may take the other one."""

HALF_NEAR_ZERO = 1e-6
"""Beside HALF_ULPS, share of the largest result: the same float32 error where results cancel to nearly zero, whose
units in the last place are smaller still."""

HALF_ROUNDED_OTHERWISE = 0.01
"""Share of half-precision results that may differ from the exact result rounded once. A float32 error of 1e-6 crosses a
tie in 1e-6 / 1e-3 of all float16 results; truncation, or rounding twice, would show in half of them."""

RUNNING = 1e-6
"""float32 running statistics after 20 steps against torch's, share of their scale: a rounding of 6e-8 a step, which the
next steps forget."""
