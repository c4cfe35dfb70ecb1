"""`perplexit compile`: a checkpoint → a program with the perplexity head inside."""

from pathlib import Path
from typing import Annotated, TypedDict, Unpack

import typer

import perplexit as px
from perplexit.cli.command_group import examples
from perplexit.cli.engine_options import takes_options
from perplexit.cli.output import Force, people, print_json, stdout_kept_clean, tell
from perplexit.cli.record_tables import program_table
from perplexit.compilation.targets import TARGETS
from perplexit.declared_options import Option
from perplexit.quantization.precisions import known_precisions

EXAMPLES = examples(
    "perplexit compile smollm2/ --to onnx -o program/",
    "perplexit compile model.gguf --to onnx --quantization int4 -o program-int4/",
    "perplexit compile smollm2/ --to openvino --quantization int8 -o program-ov/",
    "perplexit compile smollm2/ --to tvm --device llvm --max-length 512 -o program-tvm/",
    "perplexit compile smollm2/ --to gguf --quantization q4_k_m -o smollm2-q4_k_m/",
)


class CompilationOptions(TypedDict, total=False):
    """What a program is made of and for: the keywords of `compile` of these names."""

    quantization: Annotated[
        str | None,
        Option(
            "Weights in blocks of integers. "
            + " ".join(f"For {to}: {', '.join(known_precisions(to)) or 'none'}." for to in TARGETS)
        ),
    ]
    dtype: Annotated[
        str | None,
        Option(
            "The program's numbers: float32; float16 for onnx (its head stays float32); float16 or "
            "bfloat16 for gguf. [default: float32]"
        ),
    ]
    max_length: Annotated[
        int | None, Option("Fix the window's length. [default: any; tvm, pt2: 512]", lowest=1)
    ]
    batch_size: Annotated[
        int | None, Option("Fix the batch's size. [default: any; tvm, pt2: 1]", lowest=1)
    ]
    device: Annotated[
        str | None,
        Option(
            "Where the program is to run: for tvm llvm, cuda, opencl or vulkan, else cpu. "
            "[default: llvm, cpu]"
        ),
    ]


@takes_options(CompilationOptions)
def compile_model(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="hf:FOLDER, hf:FILE.gguf, hf:ID@REVISION, a path."),
    ],
    to: Annotated[str, typer.Option(help=f"What to compile to: {', '.join(TARGETS)}.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The program's folder.")
    ],
    perplexity: Annotated[
        bool,
        typer.Option(
            "--perplexity/--no-perplexity",
            help="Put the loss inside the program (ids and targets in, losses out), or have the "
            "program give logits. A GGUF file holds weights alone: llama.cpp gives logits either "
            "way.",
        ),
    ] = True,
    force: Force = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the program's record as JSON on stdout.")
    ] = False,
    **options: Unpack[CompilationOptions],
) -> None:
    """Compile a checkpoint into a program for another engine; it computes the loss in float32."""
    with stdout_kept_clean():
        program = px.compile(
            model, to=to, output=output, perplexity=perplexity, force=force, **options
        )
    record = program.to_json()
    people().print(program_table(record))
    tell(f"The program is in {output}")
    if json:
        print_json(record)
