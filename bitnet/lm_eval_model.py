"""A model of this package for EleutherAI's lm-evaluation-harness (0.4.13), registered there as `bitnet`.

Importing this module imports the harness, and registers the name; the harness looks for no models by itself. So either

    bitnet lm-eval RUN --tasks arc_easy,hellaswag                                       (see bitnet.harness)
    python -m bitnet.lm_eval_model --model bitnet --model_args pretrained=RUN --tasks arc_easy    the harness's own CLI
    lm_eval.simple_evaluate(model=BitNetLM("RUN"), tasks=["arc_easy"])

What is computed follows the harness's `hf` model: a text is encoded behind bos where the tokenizer has one; the space
that ends a context belongs to the continuation; what is too long loses its beginning; a text without context follows
bos, else eos. Four things differ, and are meant. A rolling text follows one bos, not two, where the tokenizer has one.
The text after a prompt keeps the space that some tokenizers take off its beginning. Stop strings are looked for in the
text, not in the names of special tokens. And special tokens come from chat templates alone: "</s>" in a question is
four characters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bitnet.batching import Batch
from bitnet.chat_template import CLOSE, MARKS, OPEN, Message, Part, Template, choose, joined
from bitnet.errors import ConfigError
from bitnet.generation_options import load
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler
from bitnet.scoring import Scorer
from bitnet.text_stream import Spelling, tokenizer_of
from bitnet.threads import use_threads

SLOTS = 8  # texts that grow together: a step of eight takes little longer than one
MARKED = re.compile(f"{OPEN}(\\d+){CLOSE}")  # a special token in a text that a chat template wrote
MEANT = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed"}
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "min_p": 0.0, "typical_p": 1.0, "length_penalty": 1.0}


@register_model("bitnet")
class BitNetLM(TemplateLM):  # type: ignore[misc]  # the harness has no type stubs
    """A run, checkpoint, file or model, as the harness asks for it.

    pretrained: anything that bitnet.from_pretrained opens, or a model with its tokenizer. max_length: tokens read at
    most, by default all the model's positions. batch_size: rows of one pass at most; "auto" (and the default) is as
    many as 4096 tokens make. prefix_token_id: what a text without context follows, by default bos, else eos.
    add_bos_token: whether bos precedes every text, by default where the tokenizer has one. template: as in
    chat_template.choose. layout, head, threads: as in `bitnet generate`. device and max_batch_size are the harness's,
    and mean nothing here. ConfigError, as from Scorer.
    """

    def __init__(
        self,
        pretrained: str | Path | BitNetForCausalLM,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        template: str = "auto",
        layout: str = "auto",
        head: str | None = None,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        use_threads(threads)
        self.run: str | None = None
        if isinstance(pretrained, BitNetForCausalLM):
            self.model = pretrained
        else:
            self.run = str(pretrained)  # the harness turns an argument that looks like a number into one
            self.model = load(self.run, layout, head)
        self.tokens = tokenizer_of(self.model)
        self.scorer = Scorer(self.model, max_length, _rows(batch_size))
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self._prefix = prefix_token_id
        self._template_name = template
        self._template: Template | None = None  # from the first conversation on
        self._adds_bos = self.tokens.bos_id is not None if add_bos_token is None else add_bos_token
        if self._adds_bos and self.tokens.bos_id is None:
            raise ConfigError("add_bos_token=True needs a tokenizer that has a bos")

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self.scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """eos, else bos; ConfigError if the tokenizer has neither."""
        return self._special(self.tokens.eos_id, self.tokens.bos_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self._special(self._prefix, self.tokens.bos_id, self.tokens.eos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, behind bos where that is the rule and the text does not begin with it."""
        ids: list[int] = []
        for i, piece in enumerate(MARKED.split(string)):
            if i % 2:
                ids.append(int(piece))
            elif piece:
                ids += self.tokens.encode(piece)
        bos = self.tokens.bos_id
        if add_special_tokens is None:
            wanted = self._adds_bos and ids[:1] != [bos]
        else:
            wanted = add_special_tokens and self._adds_bos
        return [bos, *ids] if wanted and bos is not None else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="scoring", disable=disable_tqdm or None, leave=False) as bar:
            scores = self.scorer.score([request[1:] for request in requests], bar.update)
        for request, score in zip(requests, scores, strict=True):
            if request[0] is not None:  # the windows of a rolling text have no texts of their own
                self.cache_hook.add_partial("loglikelihood", request[0], tuple(score))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Natural-log probability of each whole text, in windows of max_length with one token of context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        terms: list[list[float]] = [[] for _ in requests]
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            terms[owner].append(logprob)
        totals = [math.fsum(values) for values in terms]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to eos or the first of its stop strings, which is not part of it."""
        wishes = [Wish(self, request.args[0], request.args[1], number) for number, request in enumerate(requests)]
        if not wishes:
            return []
        capacity = max(len(wish.prompt) + wish.most for wish in wishes)
        batch = Batch(self.model, min(SLOTS, len(wishes)), min(capacity, self.max_length))
        # Longest first, and those that begin alike one after the other, since a slot keeps what it held.
        waiting = sorted((wish for wish in wishes if wish.most), key=lambda wish: (len(wish.prompt), wish.prompt))
        live: dict[int, Wish] = {}
        with tqdm(total=len(wishes), desc="generating", disable=disable_tqdm or None, leave=False) as bar:
            while waiting or live:
                while waiting and batch.free:
                    wish = waiting.pop()
                    number = batch.add(wish.prompt, wish.sampler, wish.most, wish.ends, self.tokens.vocab_size)
                    live[number] = wish
                for number, token, reason, *_ in batch.step():
                    if number not in live:
                        continue
                    wish = live[number]
                    if token is not None:
                        wish.text += wish.spelling.push(token)
                    if wish.spelling.stopped or reason is not None:
                        wish.text += wish.spelling.rest()
                        batch.remove(number)
                        del live[number]
                        self.cache_hook.add_partial("generate_until", wish.args, wish.text)
                        bar.update()
        return [wish.text for wish in wishes]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation up to the first word of the next answer, or, without that, up to the last of its last one."""
        messages = [Message(entry["role"], MARKS.sub("", entry["content"])) for entry in chat_history]
        template = self._template = self._template or choose(self._template_name, self.tokens)
        parts: list[Part] = template.parts(messages if add_generation_prompt else messages[:-1])
        if not add_generation_prompt:
            parts = joined(parts, messages[-1].content)
        return "".join(part if isinstance(part, str) else f"{OPEN}{part}{CLOSE}" for part in parts)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness writes into its results: the template's source, or its name."""
        if chat_template is False:
            return None
        return self.tokens.chat_template or choose(self._template_name, self.tokens).name

    @property
    def tokenizer_name(self) -> str:
        """Keys of the harness's caches of requests."""
        return f"{self.tokens.name}-{self.tokens.fingerprint()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """For the results file."""
        return {"model_run": self.run, "model_step": getattr(self.model, "step", None), "max_length": self.max_length}

    def ends(self) -> tuple[frozenset[int], list[str]]:
        """Ids and texts that end every answer: eos, as the token or spelled out, and what ends a turn in a chat."""
        eos = self.tokens.eos_id
        ids = frozenset[int]() if eos is None else frozenset([eos])
        stops = [name for name, id_ in self.tokens.special_tokens().items() if id_ == eos]
        if self._template is not None:
            ids, stops = ids | self._template.end_ids, [*stops, *self._template.stops]
        return ids, stops

    @staticmethod
    def _special(*ids: int | None) -> int:
        found = next((id_ for id_ in ids if id_ is not None), None)
        if found is None:
            raise ConfigError("this tokenizer has no bos and no eos: name the token before a text, prefix_token_id=ID")
        return found


class Wish:
    """One text to be generated: prompt, how its tokens are chosen, where it stops, and what there is of it."""

    def __init__(self, lm: BitNetLM, context: str, gen_kwargs: dict[str, Any], number: int) -> None:
        self.args = (context, gen_kwargs)
        kwargs = normalize_gen_kwargs(gen_kwargs, lm.max_gen_toks)
        odd = [name for name, value in kwargs.items() if name not in MEANT and NEUTRAL.get(name, ...) != value]
        if odd:
            raise ConfigError(
                f"generation_kwargs have {odd[0]}={kwargs[odd[0]]!r}, which this model cannot follow; it knows "
                f"{', '.join(sorted(MEANT))}"
            )
        self.most: int = kwargs["max_gen_toks"]
        room = lm.max_length - self.most
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={self.most} leaves none of the {lm.max_length} tokens that the model may read for the "
                "prompt"
            )
        ids = lm.tok_encode(context) or [lm.prefix_token_id]
        self.prompt = ids[-room:]
        temperature = float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0
        self.sampler = Sampler(
            temperature,
            kwargs.get("top_k") or None,
            kwargs.get("top_p"),
            kwargs.get("repetition_penalty", 1.0),
            # Repeats of one question are to differ, each the same in every run.
            kwargs.get("seed", lm.seed) + (number if temperature else 0),
        )
        self.ends, stops = lm.ends()
        self.spelling = Spelling(lm.tokens, self.prompt, [stop for stop in kwargs["until"] if stop] + stops)
        self.text = ""


def _rows(batch_size: int | str | None) -> int | None:
    """Scorer's batch_size for the harness's: a number, or "auto", "auto:4"."""
    if batch_size is None or (isinstance(batch_size, str) and batch_size.partition(":")[0] == "auto"):
        return None
    try:
        return int(batch_size)
    except ValueError:
        raise ConfigError(f"batch_size must be a number or auto, not {batch_size!r}") from None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
