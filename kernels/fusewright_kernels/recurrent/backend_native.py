"""What the compiled recurrent kernels do not take."""

from fusewright_kernels.dispatch import Call


def refuse_projection(call: Call) -> str | None:
    return "a projection of the hidden state (weight_hr) has no compiled kernel"
