"""The options of `prepare` that decide what is made of a text, declared once."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from perplexit.declared_options import Option


class PreparingOptions(TypedDict, total=False):
    """How text becomes windows. What is left out has the default of `prepare`."""

    protocol: Annotated[
        str,
        Option(
            "How windows are chosen: sliding, disjoint, document, or as another tool does: "
            "lm-eval, hf-guide, hf-evaluate, llama-cpp, vllm, gptq-2048, qefficient, mlc.",
            default="sliding",
        ),
    ]
    max_length: Annotated[
        int | None,
        Option("Ids fed forward in one window. [default: the protocol's own]", lowest=1),
    ]
    stride: Annotated[
        int | None, Option("How far windows advance. [default: half of --max-length]", lowest=1)
    ]
    bos: Annotated[
        str,
        Option(
            "BOS policy: auto (what the tokenizer itself adds), none, first, every.", default="auto"
        ),
    ]
    text_key: Annotated[
        str | None, Option("The column of a table that holds the text. [default: text]")
    ]
    domain_key: Annotated[str | None, Option("The column that names a document's domain.")]
    prompt_key: Annotated[
        str | None, Option("The column of a prompt: it is context, and only the text is scored.")
    ]
    keep: Annotated[
        str | Sequence[str] | None,
        Option(
            "A column that stays with each document, beside its file and row; repeatable.",
            metavar="NAME",
        ),
    ]
