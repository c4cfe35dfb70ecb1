"""The doctor's checks of vocabulary, window length and precision."""

from perplexit.diagnosis.doctor_findings import (
    Finding,
    failed,
    passed,
    skipped,
    warned,
)
from perplexit.diagnosis.doctor_probe import ExaminedModel
from perplexit.evaluation.input_fit import UNKNOWN_VOCABULARY
from perplexit.quantization.precisions import canonical_dtype, canonical_precision


def vocabulary(examined: ExaminedModel) -> Finding:
    """Tell whether every id has a row in the model, and how many rows have no token."""
    rows = examined.session.model.vocab_size
    if rows >= UNKNOWN_VOCABULARY:
        return skipped("this engine does not tell how many rows the model has")
    largest = int(examined.probe.ids_S.max())
    if examined.tokens is not None:
        prefix_id = int(examined.tokens.windows.prefix_id.max(initial=-1))
        largest = max(int(examined.tokens.token_ids.max(initial=-1)), prefix_id)
    sizes = [
        entry.vocab_size for entry in (examined.tokenizer, examined.tokens) if entry is not None
    ]
    num_tokens = max(sizes, default=0)
    if max(largest + 1, num_tokens) > rows:
        return failed(
            f"the tokenizer has {num_tokens} ids (the largest fed is {largest}), the model "
            f"{rows} rows",
            max(largest + 1, num_tokens),
            rows,
            advice="use the tokenizer that the model was trained with",
        )
    spare = rows - num_tokens
    sentence = f"every id has a row; the largest fed is {largest}"
    if num_tokens and spare:
        sentence += f"; rows {num_tokens} to {rows - 1} ({spare}) have no token"
    if num_tokens and spare > max(1024, rows // 10):
        advice = "padding rarely takes so many rows: is this the model's own tokenizer?"
        return warned(sentence, spare, max(1024, rows // 10), advice=advice)
    return passed(sentence, max(largest + 1, num_tokens), rows)


def window_length(examined: ExaminedModel) -> Finding:
    """Tell whether the windows are ones that the model was made for."""
    made_for = examined.session.model.max_length
    longest = examined.probe.max_length
    if examined.tokens is not None:
        longest = int(examined.tokens.fed_lengths().max(initial=0))
    if made_for is None:
        return skipped("this engine does not tell what the model was made for")
    sentence = f"windows of up to {longest} ids; the model was made for {made_for}"
    if longest <= made_for:
        return passed(sentence, longest, made_for)
    advice = f"prepare with --max-length {made_for}, or call it a test of extrapolation"
    return warned(sentence, longest, made_for, advice=advice)


def dtype(examined: ExaminedModel) -> Finding:
    """Tell whether the precision in effect is the one asked for; float32 where none was."""
    description = examined.session.description
    quantization = description.quantization
    asked = canonical_dtype(examined.dtype) if examined.dtype else None
    sentence = f"computed in {description.dtype}"
    if quantization is not None:
        sentence += (
            f"; weights {quantization.name} by {quantization.library} "
            f"({quantization.effective_bits:.3g} bits per parameter)"
        )
    if examined.quantization is not None and (
        quantization is None
        or canonical_precision(quantization.name) != canonical_precision(examined.quantization)
    ):
        return failed(
            f"{sentence}, but {examined.quantization} was asked for",
            advice="compile or load the model again with that quantization",
        )
    if description.dtype.startswith("unknown"):
        return skipped(f"{sentence}: the engine does not tell")
    if asked is not None and description.dtype != asked:
        return failed(
            f"{sentence}, but {asked} was asked for",
            description.dtype,
            asked,
            advice="see the engine's settings in the record",
        )
    if asked is None and description.dtype not in ("float32", "float64"):
        return warned(
            f"{sentence}: losses carry its rounding",
            description.dtype,
            "float32",
            advice="load with --dtype float32 for reference figures",
        )
    return passed(sentence, description.dtype, asked or "float32")
