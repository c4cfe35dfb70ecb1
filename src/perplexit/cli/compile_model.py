"""`perplexit compile`: a checkpoint → a program with the perplexity head inside."""

from pathlib import Path
from typing import Annotated

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.output import Force, people, print_json, stdout_kept_clean, tell
from perplexit.cli.record_tables import program_table
from perplexit.compilation.targets import TARGETS
from perplexit.quantization.precisions import known_precisions

EXAMPLES = examples(
    "perplexit compile smollm2/ --to onnx -o program/",
    "perplexit compile model.gguf --to onnx --quantization int4 -o program-int4/",
    "perplexit compile smollm2/ --to openvino --quantization int8 -o program-ov/",
    "perplexit compile smollm2/ --to tvm --device llvm --max-length 512 -o program-tvm/",
    "perplexit compile smollm2/ --to gguf --quantization q4_k_m -o smollm2-q4_k_m/",
)


def compile_model(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="hf:FOLDER, hf:FILE.gguf, hf:ID@REVISION, a path."),
    ],
    to: Annotated[str, typer.Option(help=f"What to compile to: {', '.join(TARGETS)}.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The program's folder.")
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Weights in blocks of integers. "
            + " ".join(f"For {to}: {', '.join(known_precisions(to)) or 'none'}." for to in TARGETS)
        ),
    ] = None,
    perplexity: Annotated[
        bool,
        typer.Option(
            "--perplexity/--no-perplexity",
            help="Put the loss inside the program (ids and targets in, losses out), or have the "
            "program give logits. A GGUF file holds weights alone: llama.cpp gives logits either "
            "way.",
        ),
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="The program's numbers: float32; float16 for onnx (its head stays float32); "
            "float16 or bfloat16 for gguf. "
            "\\[default: float32]"
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Fix the window's length. \\[default: any; tvm, pt2: 512]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Fix the batch's size. \\[default: any; tvm, pt2: 1]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the program is to run: for tvm llvm, cuda, opencl or vulkan, else cpu. "
            "\\[default: llvm, cpu]"
        ),
    ] = None,
    force: Force = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the program's record as JSON on stdout.")
    ] = False,
) -> None:
    """Compile a checkpoint into a program for another engine; it computes the loss in float32."""
    with stdout_kept_clean():
        program = px.compile(
            model,
            to=to,
            output=output,
            quantization=quantization,
            perplexity=perplexity,
            dtype=dtype,
            max_length=max_length,
            batch_size=batch_size,
            device=device,
            force=force,
        )
    record = program.to_json()
    people().print(program_table(record))
    tell(f"The program is in {output}")
    if json:
        print_json(record)
