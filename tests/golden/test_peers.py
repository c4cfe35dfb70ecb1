"""Each protocol against the tool it is named after, side by side on one model and one unseen text.

Where the tool can be installed, its own code runs (lm-eval, torchmetrics, minicons, surprisal);
where it cannot, its arithmetic stands here as plainly as in its source. Perplexity and the number
of scored tokens must both agree. The tiny model runs always, the real one is marked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import perplexit as px
from perplexit.runs.run import Run
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.unseen_text import DOCUMENTS

TOLERANCE = 1e-4  # relative
BLANK_LINE = "\n\n"
SHORT = DOCUMENTS[1:4]

needs_real_model = (pytest.mark.slow, pytest.mark.real_model)


@dataclass
class Rig:
    """One loaded model, for Perplexit's session and for the peers alike."""

    folder: Path
    model: torch.nn.Module
    tokenizer: object
    losses: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def run(self, texts: Sequence[str], protocol: str, **options: object) -> Run:
        tokens = px.prepare(list(texts), tokenizer=self.folder, protocol=protocol, **options)
        with torch.no_grad():
            return px.evaluate(PytorchInferenceSession(self.model), tokens, batch_size=2)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def losses_of(self, ids: Sequence[int]) -> list[float]:
        """-log p of every id but the first, from one plain forward pass."""
        key = tuple(ids)
        if key not in self.losses:
            with torch.no_grad():
                logits = self.model(torch.tensor([key])).logits[0, :-1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            targets = torch.tensor(key[1:])[:, None]
            self.losses[key] = (-logprobs.gather(1, targets)[:, 0]).double().tolist()
        return self.losses[key]


@pytest.fixture(
    scope="module",
    params=["tiny_llama_dir", pytest.param("real_model_dir", marks=needs_real_model)],
)
def rig(request: pytest.FixtureRequest) -> Rig:
    folder = request.getfixturevalue(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Rig(folder, model, AutoTokenizer.from_pretrained(folder))


def same(found: float | None, expected: float) -> None:
    assert found == pytest.approx(expected, rel=TOLERANCE)


# --- the tools themselves ----------------------------------------------------------------------


def test_lm_eval(rig: Rig) -> None:
    """HFLM.loglikelihood_rolling with lm-eval's own word, byte and bit arithmetic."""
    from lm_eval.api.instance import Instance  # noqa: PLC0415 - seconds to import
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity  # noqa: PLC0415
    from lm_eval.api.task import PerplexityTask  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    peer = HFLM(pretrained=rig.model, tokenizer=rig.tokenizer, max_length=96, device="cpu")
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in DOCUMENTS]
    logprobs = peer.loglikelihood_rolling(requests, disable_tqdm=True)
    by_word = [(p, PerplexityTask.count_words(t)) for p, t in zip(logprobs, DOCUMENTS, strict=True)]
    by_byte = [(p, PerplexityTask.count_bytes(t)) for p, t in zip(logprobs, DOCUMENTS, strict=True)]

    run = rig.run(DOCUMENTS, "lm-eval", max_length=96)
    same(run.nll_sum, -math.fsum(logprobs))
    same(run.word_perplexity, weighted_perplexity(by_word))
    same(run.byte_perplexity, weighted_perplexity(by_byte))
    same(run.bits_per_byte, bits_per_byte(by_byte))
    assert run.num_tokens == sum(len(peer.tok_encode(text)) for text in DOCUMENTS)
    assert (run.num_words, run.num_bytes) == (
        sum(n for _, n in by_word),
        sum(n for _, n in by_byte),
    )


def test_torchmetrics(rig: Rig) -> None:
    """The metric fed the logits of disjoint chunks: `disjoint`."""
    from torchmetrics.text import Perplexity  # noqa: PLC0415

    peer = Perplexity()
    ids = rig.ids(DOCUMENTS[0])
    for start in range(0, len(ids), 128):
        chunk = torch.tensor([ids[start : start + 128]])
        if chunk.shape[1] > 1:
            with torch.no_grad():
                peer.update(rig.model(chunk).logits[:, :-1], chunk[:, 1:])
    run = rig.run(DOCUMENTS[:1], "disjoint", max_length=128)
    same(run.perplexity, peer.compute().item())
    assert run.num_tokens == int(peer.count)


@pytest.mark.parametrize("bos", ["none", "first"])
def test_minicons(rig: Rig, bos: str) -> None:
    """IncrementalLMScorer on whole texts, alone and behind a BOS: `document`."""
    from minicons.scorer import IncrementalLMScorer  # noqa: PLC0415

    peer = IncrementalLMScorer(rig.model, device="cpu", tokenizer=rig.tokenizer)
    scores = peer.compute_stats(peer.prepare_text(list(SHORT), bos_token=bos == "first"))
    logprobs = [logprob for text in scores for logprob in text]
    run = rig.run(SHORT, "document", bos=bos)
    same(run.perplexity, math.exp(-math.fsum(logprobs) / len(logprobs)))
    assert run.num_tokens == len(logprobs)


@pytest.mark.trap(22)
def test_surprisal(rig: Rig) -> None:
    """`surprise`, which always puts a BOS in front: `document` with bos first.

    It pads with EOS and masks that logit, so the other tokens share EOS's probability. What that
    takes off each loss, -log(1 - p(EOS)), is put back here; nothing else separates the two.
    """
    from surprisal import CausalHuggingFaceModel  # noqa: PLC0415

    shared = SimpleNamespace(from_pretrained=lambda *_, **__: rig.model)
    peer = CausalHuggingFaceModel(str(rig.folder), model_class=shared)
    bos_id, eos_id = rig.tokenizer.bos_token_id, rig.tokenizer.eos_token_id
    assert peer.tokenizer.pad_token_id == eos_id
    surprisals, hidden = [], 0.0
    for text in SHORT:
        surprisals += [float(value) for value in peer.surprise(text)[0].surprisals]
        with torch.no_grad():
            logits = rig.model(torch.tensor([[bos_id, *rig.ids(text)]])).logits[0, :-1]
        p_eos = torch.softmax(logits.double(), dim=-1)[:, eos_id]
        hidden -= torch.log1p(-p_eos).sum().item()

    run = rig.run(SHORT, "document", bos="first")
    same(run.perplexity, math.exp((math.fsum(surprisals) + hidden) / len(surprisals)))
    assert run.num_tokens == len(surprisals)
    assert hidden > 0


# --- their arithmetic, written plainly ---------------------------------------------------------


@pytest.mark.parametrize("stride", [128, 48])
def test_hf_guide(rig: Rig, stride: int) -> None:
    """huggingface.co/docs/transformers/perplexity, with and without overlap."""
    ids, max_length = rig.ids(BLANK_LINE.join(DOCUMENTS[:2])), 128
    nll_sum, num_counted, num_scored, previous = 0.0, 0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        new = min(end - previous, end - begin)
        losses = rig.losses_of(ids[begin:end])[-new:]  # labels before are -100; the first has none
        num_loss_tokens = new - 1  # "subtract batch_size due to internal label shift"
        nll_sum += math.fsum(losses) / len(losses) * num_loss_tokens
        num_counted += num_loss_tokens
        num_scored += len(losses)
        previous = end
        if end == len(ids):
            break
    run = rig.run(DOCUMENTS[:2], "hf-guide", max_length=max_length, stride=stride)
    same(run.protocol_perplexity, math.exp(nll_sum / num_counted))
    assert run.num_tokens == num_scored


@pytest.mark.trap(12)
@pytest.mark.parametrize("add_start_token", [True, False])
def test_hf_evaluate(rig: Rig, add_start_token: bool) -> None:
    """evaluate's metrics/perplexity: a perplexity a text (cut off), then the mean of those."""
    max_length, perplexities, num_scored = 100, [], 0
    for text in DOCUMENTS[1:6]:
        if add_start_token:  # leave room for the BOS
            ids = [rig.tokenizer.bos_token_id, *rig.ids(text)[: max_length - 1]]
        else:
            ids = rig.ids(text)[:max_length]
        losses = rig.losses_of(ids)
        perplexities.append(math.exp(math.fsum(losses) / len(losses)))
        num_scored += len(losses)
    bos = "first" if add_start_token else "none"
    run = rig.run(DOCUMENTS[1:6], "hf-evaluate", max_length=max_length, bos=bos)
    same(run.protocol_perplexity, math.fsum(perplexities) / len(perplexities))
    assert run.num_tokens == num_scored
    assert run.protocol_perplexity > run.perplexity * (1 + 10 * TOLERANCE)  # Jensen


@pytest.mark.trap(6)
@pytest.mark.parametrize("add_bos", [False, True])
def test_llama_cpp(rig: Rig, add_bos: bool) -> None:
    """tools/perplexity: chunks of 512, BOS over each first token, the second half counts."""
    n_ctx, first = 512, 256
    bos_id = rig.tokenizer.bos_token_id
    tokens = ([bos_id] if add_bos else []) + rig.ids(BLANK_LINE.join(DOCUMENTS))
    nll, count = 0.0, 0
    for chunk in range(len(tokens) // n_ctx):
        batch = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
        if add_bos:
            batch[0] = bos_id
        scored = rig.losses_of(batch)[first:]  # position i predicts token i + 1: 256 … 510
        nll += math.fsum(scored)
        count += n_ctx - first - 1
        assert len(scored) == 255
    run = rig.run(DOCUMENTS, "llama-cpp", bos="first" if add_bos else "none")
    same(run.perplexity, math.exp(nll / count))
    assert run.num_tokens == count
    assert run.protocol_perplexity is None


@pytest.mark.slow
@pytest.mark.real_model
def test_llama_cpp_in_llama_cpp_itself(real_model_dir: Path, tmp_path: Path) -> None:
    """The same chunks through llama.cpp's own engine, against the arithmetic in PyTorch.

    Across two engines: within 5e-3. The weights are those of PyTorch (llama.cpp's kernels for the
    packaged 4-bit file quantize activations too, which moves this text by 1.2 %).
    """
    pytest.importorskip("llama_cpp")
    texts = DOCUMENTS[:4]
    program = px.compile(real_model_dir, to="gguf", output=tmp_path / "gguf", perplexity=False)
    tokens = px.prepare(list(texts), tokenizer=real_model_dir, protocol="llama-cpp", max_length=128)
    run = px.evaluate(program.folder, tokens, threads=1)
    model = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32).eval()
    rig = Rig(real_model_dir, model, AutoTokenizer.from_pretrained(real_model_dir))
    ids = rig.ids(BLANK_LINE.join(texts))
    losses = []
    for begin in range(0, len(ids) // 128 * 128, 128):
        losses += rig.losses_of(ids[begin : begin + 128])[64:]
    assert run.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=5e-3)
    assert run.num_tokens == len(losses)


def test_vllm(rig: Rig) -> None:
    """vLLM's ppl test: chunks of max_model_len - 1 = 1023, the tail kept, first tokens unscored."""
    ids = rig.ids(BLANK_LINE.join(DOCUMENTS))
    losses = []
    for begin in range(0, len(ids), 1023):
        losses += rig.losses_of(ids[begin : begin + 1023])
    run = rig.run(DOCUMENTS, "vllm")
    same(run.perplexity, math.exp(math.fsum(losses) / len(losses)))
    assert run.num_tokens == len(losses)


def test_gptq_2048(rig: Rig) -> None:
    """The GPTQ papers' loop: mean loss times 2048 for each chunk, over all chunks' 2048 ids."""
    seqlen, texts = 2048, DOCUMENTS + DOCUMENTS
    ids = rig.ids(BLANK_LINE.join(texts))
    num_samples = len(ids) // seqlen
    nlls, num_scored = [], 0
    for sample in range(num_samples):
        losses = rig.losses_of(ids[sample * seqlen : (sample + 1) * seqlen])
        nlls.append(math.fsum(losses) / len(losses) * seqlen)
        num_scored += len(losses)
    run = rig.run(texts, "gptq-2048")
    same(run.perplexity, math.exp(sum(nlls) / (num_samples * seqlen)))
    assert run.num_tokens == num_scored


@pytest.mark.trap(7)
def test_qefficient(rig: Rig) -> None:
    """QEfficient's script: full windows every stride, overlap scored twice, the tail dropped."""
    ids, ctx_len, stride = rig.ids(BLANK_LINE.join(DOCUMENTS[:2])), 128, 64
    losses = []
    for begin in range(0, len(ids) - ctx_len + 1, stride):
        losses += rig.losses_of(ids[begin : begin + ctx_len])
    run = rig.run(DOCUMENTS[:2], "qefficient", max_length=ctx_len, stride=stride)
    same(run.perplexity, math.exp(math.fsum(losses) / len(losses)))
    assert run.num_tokens == len(losses)


@pytest.mark.trap(30)
def test_mlc(rig: Rig) -> None:
    """MLC's scripts: windows of 256 every 128, short tails too, exp of the mean of line means."""
    ids = rig.ids(BLANK_LINE.join(DOCUMENTS[:3]))
    means, num_scored = [], 0
    for begin in range(0, len(ids), 128):
        line = ids[begin : begin + 256]
        if len(line) > 1:  # a line of one token gives NaN there
            losses = rig.losses_of(line)
            means.append(math.fsum(losses) / len(losses))
            num_scored += len(losses)
    run = rig.run(DOCUMENTS[:3], "mlc")
    same(run.protocol_perplexity, math.exp(math.fsum(means) / len(means)))
    assert run.num_tokens == num_scored
