"""What `compile --to gguf` is asked for, in one name, before anything heavy is imported."""

from perplexit.errors import CapabilityError
from perplexit.quantization.precisions import canonical_dtype, recipe_for


def gguf_precision(
    *,
    quantization: str | None,
    dtype: str | None,
    max_length: int | None,
    batch_size: int | None,
    device: str,
) -> str:
    """The type of the matrices: the quantization's name, else the dtype's (float32 by default).

    Raises QuantizationError for an unknown name, and CapabilityError for options that a GGUF file
    does not have or that contradict each other.
    """
    if max_length is not None or batch_size is not None:
        raise CapabilityError(
            "expected neither --max-length nor --batch-size for a GGUF file: it holds weights, and "
            "takes windows of any length; leave them out"
        )
    if device != "cpu":
        raise CapabilityError(
            f"a GGUF file is written and checked on the cpu, got device {device!r}; name the "
            "device when the file is evaluated"
        )
    if quantization is None:
        return canonical_dtype(dtype or "float32")
    if dtype is not None:
        raise CapabilityError(
            f"expected a quantization or a dtype for the matrices of a GGUF file, got both "
            f"({quantization} and {dtype}); leave one out"
        )
    return recipe_for(quantization, engine="gguf").precision
