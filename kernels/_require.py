"""The questions that every input check is made of, and the one wording of their errors.

Each that demands something takes the operator's name, and the argument's with its value, and raises ValueError or
TypeError. The others, at the end, answer or put into words.
"""

import sys

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def fail(operator, argument, must, got, error=ValueError):
    """Raises the one error of the package's grammar."""
    raise error(f"{operator}: {argument} must {must}, got {got}")


def tensor(operator, argument, value, shape, *, like=None, device_of=None, dtypes=DTYPES):
    """Checks kind, shape, dtype and device; returns the sizes. A name in shape stands for any size but 0, B for any."""
    if not isinstance(value, torch.Tensor) or not is_dense(value):
        fail(operator, argument, f"be a dense tensor of shape {named(shape)}", kind_of(value), TypeError)
    sizes = tuple(value.shape)
    if len(sizes) != len(shape):
        fail(operator, argument, f"be of shape {named(shape)}", shape_of(value))
    empty = False
    # A loop: any() of an expression takes twice as long.
    for size, wanted in zip(sizes, shape, strict=True):
        if isinstance(wanted, str):
            empty = empty or (size == 0 and wanted != "B")
        elif size != wanted:
            fail(operator, argument, f"be of shape {named(shape)}", shape_of(value))
    if empty:
        fail(operator, argument, f"be empty along no axis of {named(shape)} but B", shape_of(value))
    dtype = value.dtype
    if like is not None and dtype != like[1].dtype:
        fail(operator, argument, f"have the dtype of {like[0]}, {like[1].dtype}", dtype)
    if dtype not in dtypes:
        fail(operator, argument, f"have dtype {' or '.join(map(str, dtypes))}", dtype)
    if (other := like or device_of) is not None and value.device != other[1].device:
        fail(operator, argument, f"be on the device of {other[0]}, {other[1].device}", value.device)
    return sizes


def integer(operator, argument, value, least, most=None):
    if not is_integer(value, least) or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        fail(operator, argument, f"be an integer {span}", repr(value))


def boolean(operator, argument, value):
    if not isinstance(value, bool):
        fail(operator, argument, "be True or False", repr(value))


def number(operator, argument, value, *, positive=False):
    # Comparisons alone: of a number that torch.compile takes for a variable nothing else can be asked.
    is_number = isinstance(value, _NUMBERS) and not isinstance(value, bool)
    finite = is_number and -sys.float_info.max <= value <= sys.float_info.max
    if not finite or (positive and value <= 0):
        fail(operator, argument, f"be a finite{' positive' if positive else ''} number", repr(value))


def sequence(operator, argument, value, length=None):
    if not isinstance(value, (tuple, list, torch.nn.ModuleList)):
        fail(operator, argument, "be a list with one entry for each layer", kind_of(value), TypeError)
    if len(value) == 0 and length is None:
        fail(operator, argument, "have one entry for each layer", "none")
    if length is not None and len(value) != length:
        fail(operator, argument, f"have {length} entries, one for each layer", len(value))


def is_integer(value, least):
    """Whether it is one of at least `least`."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and value >= least


def is_dense(value):
    return value.layout == torch.strided and not value.is_nested


def named(shape):
    return f"[{', '.join(map(str, shape))}]"


def shape_of(value):
    return f"shape {list(value.shape)}"


def kind_of(value):
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}"
    return "a nested tensor" if value.is_nested else "a tensor"
