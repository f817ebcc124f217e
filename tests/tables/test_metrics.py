"""Metrics: one number for each prompt, against the same number computed by hand from plain transformers' logits."""

import functools
import math

import pytest
import torch

import hookkit as hk
from hookkit.tables.metrics.metric import as_metrics, column_names

PROMPTS = [[17, 250, 3, 88, 41], [5, 9], [200, 14, 77, 120, 31, 8, 300, 66]]


@pytest.fixture(scope="module")
def small() -> hk.LM:
    """A model of 320 tokens without a tokenizer."""
    return hk.tiny("llama")


@pytest.fixture(scope="module")
def padded(small_tokenizer) -> hk.LM:
    """A model whose vocabulary has 20 rows that are no token, and whose head likes them best."""
    lm = hk.tiny(
        "llama", tokenizer=small_tokenizer, config={"vocab_size": len(small_tokenizer) + 20}
    )
    with torch.no_grad():
        lm.model.lm_head.weight[len(small_tokenizer) :] = 4 * lm.model.lm_head.weight[3]
    return lm


def said(lm: hk.LM, ids: list[int], pos: int = -1) -> torch.Tensor:
    """What the plain model says at a position of one prompt by itself: [vocab]."""
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0, pos].double()


def probs(logits: torch.Tensor) -> torch.Tensor:
    """The softmax written out."""
    shifted = (logits - logits.max()).exp()
    return shifted / shifted.sum()


def rank_of(logits: torch.Tensor, token: int) -> float:
    return 1.0 + sum(float(other) > float(logits[token]) for other in logits)


BY_HAND = {
    "logit_diff": (hk.metrics.logit_diff(5, 7), lambda s: s[5] - s[7]),
    "logit_diff of several": (
        hk.metrics.logit_diff((5, 6), (7, 8, 9, 10)),
        lambda s: (s[5] + s[6]) / 2 - (s[7] + s[8] + s[9] + s[10]) / 4,
    ),
    "logit": (hk.metrics.logit(11), lambda s: s[11]),
    "logit of several": (hk.metrics.logit((11, 12)), lambda s: (s[11] + s[12]) / 2),
    "logprob": (hk.metrics.logprob(5), lambda s: probs(s)[5].log()),
    "logprob of several": (hk.metrics.logprob((5, 6)), lambda s: (probs(s)[5] + probs(s)[6]).log()),
    "prob": (hk.metrics.prob(5), lambda s: probs(s)[5]),
    "prob of several": (hk.metrics.prob((5, 6)), lambda s: probs(s)[5] + probs(s)[6]),
    "rank": (hk.metrics.rank(5), lambda s: rank_of(s, 5)),
    "rank of several": (
        hk.metrics.rank((5, 6)),
        lambda s: min(rank_of(s, token) for token in (5, 6)),
    ),
    "entropy": (hk.metrics.entropy(), lambda s: -(probs(s) * probs(s).log()).sum()),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("pos", [-1, -2, 1])
def test_a_metric_of_a_batch_is_the_number_by_hand_of_each_prompt_alone(small, name, pos):
    metric, by_hand = BY_HAND[name]
    found = metric(hk.forward(small, PROMPTS), pos=pos)
    wanted = [float(by_hand(said(small, ids, pos))) for ids in PROMPTS]
    assert found.shape == (3,) and found.device.type == "cpu"
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)


def test_padding_on_the_left_and_on_the_right_give_the_same_metric(small):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    wanted = [float(said(small, row)[5] - said(small, row)[7]) for row in PROMPTS]
    for run in (
        hk.forward(small, PROMPTS),  # right
        hk.forward(small, PROMPTS, logits="last"),  # left
        hk.forward(small, {"input_ids": ids, "attention_mask": mask}),
    ):
        assert hk.metrics.logit_diff(5, 7)(run).tolist() == pytest.approx(wanted, abs=1e-4)


def test_a_list_has_an_answer_for_each_prompt(small):
    run = hk.forward(small, PROMPTS)
    metric = hk.metrics.logit_diff([5, (6, 7), 8], [(1, 2), 3, 4])
    alone = [said(small, ids) for ids in PROMPTS]
    wanted = [
        alone[0][5] - (alone[0][1] + alone[0][2]) / 2,
        (alone[1][6] + alone[1][7]) / 2 - alone[1][3],
        alone[2][8] - alone[2][4],
    ]
    assert metric(run).tolist() == pytest.approx([float(each) for each in wanted], abs=1e-4)
    several = hk.metrics.prob([5, (6, 7, 8), 9])(run)
    wanted = [probs(alone[0])[5], probs(alone[1])[6:9].sum(), probs(alone[2])[9]]
    assert several.tolist() == pytest.approx([float(each) for each in wanted], abs=1e-5)
    ranks = hk.metrics.rank([5, (6, 7), 9])(run).tolist()
    assert ranks == [
        rank_of(alone[0], 5),
        min(rank_of(alone[1], 6), rank_of(alone[1], 7)),
        rank_of(alone[2], 9),
    ]


def test_text_means_its_token(llama):
    run = hk.forward(llama, "I like oat milk in my")
    ids = llama.encode("I like oat milk in my")
    token = llama.token(" store")
    assert hk.metrics.logit(" store")(run).item() == pytest.approx(
        float(said(llama, ids)[token]), abs=1e-4
    )


def test_rows_of_the_vocabulary_that_are_no_token_have_no_rank(padded):
    ids = padded.encode("I like oat milk in my")
    logits, real = said(padded, ids), padded.n_tokens
    run = hk.forward(padded, [ids])
    best = int(logits[:real].argmax())
    assert rank_of(logits, best) > 1, "padding rows are to stand above the best token here"
    assert hk.metrics.rank(best)(run).item() == 1
    assert hk.metrics.prob(best)(run).item() == pytest.approx(
        float(probs(logits)[best]), abs=1e-5
    )  # they have their share
    assert hk.metrics.entropy()(run).item() == pytest.approx(
        float(-(probs(logits) * probs(logits).log()).sum()), abs=1e-4
    )
    table = hk.sweep(
        padded,
        [ids],
        {"token": [3, 4]},
        lambda token: hk.force(token, margin=50.0),
        hk.metrics.top1_changed(),
    )
    assert table["top1_changed"].tolist() == [float(best != token) for token in (3, 4)]


def test_a_tie_has_the_better_rank_for_both(small):
    run = hk.forward(small, PROMPTS[0], hk.edit("logits", lambda logits: torch.zeros_like(logits)))
    assert hk.metrics.rank(5)(run).item() == hk.metrics.rank(300)(run).item() == 1


def test_kl_is_the_divergence_from_the_reference_run(small):
    reference = hk.forward(small, PROMPTS)
    edit = hk.scale("z.1", 0.2)
    run = hk.forward(small, PROMPTS, edit)

    def divergence(was, now):
        return float((probs(was) * (probs(was).log() - probs(now).log())).sum())

    alone = [hk.forward(small, [ids], edit).logits[0, -1].double() for ids in PROMPTS]
    wanted = [divergence(said(small, ids), now) for ids, now in zip(PROMPTS, alone, strict=True)]
    assert min(wanted) > 1e-3
    assert hk.metrics.kl(reference)(run).tolist() == pytest.approx(wanted, abs=1e-4)
    assert hk.metrics.kl(reference)(reference).tolist() == [0, 0, 0]
    one = hk.forward(small, [PROMPTS[0]])  # one reference for all
    wanted = [divergence(said(small, PROMPTS[0]), now) for now in alone]
    assert hk.metrics.kl(one)(run).tolist() == pytest.approx(wanted, abs=1e-4)
    wanted = [divergence(said(small, PROMPTS[0], 1), now) for now in alone]
    assert hk.metrics.kl(one, pos=1)(run).tolist() == pytest.approx(wanted, abs=1e-4)


def test_kl_stays_finite_where_the_reference_bans_a_token_and_is_infinite_where_the_run_does(small):
    plain, banned = hk.forward(small, PROMPTS[0]), hk.forward(small, PROMPTS[0], hk.ban(5))
    share = float(probs(said(small, PROMPTS[0]))[5])
    assert hk.metrics.kl(banned)(plain).item() == pytest.approx(-math.log(1 - share), abs=1e-5)
    assert hk.metrics.kl(plain)(banned).item() == math.inf
    assert (
        hk.metrics.logprob(5)(banned).item() == -math.inf and hk.metrics.prob(5)(banned).item() == 0
    )
    assert math.isfinite(hk.metrics.entropy()(banned).item())


def test_kl_and_top1_without_a_reference_compare_a_cell_with_no_edit(small):
    table = hk.sweep(
        small,
        PROMPTS,
        {"head": range(4)},
        lambda head: hk.ablate(hk.Site("z", 1, head)),
        [hk.metrics.kl(), hk.metrics.top1_changed()],
    )
    for _, row in table.iterrows():
        ids = PROMPTS[int(row["row"])]
        was, now = said(small, ids), without_head(small, ids, int(row["head"]))
        wanted = float((probs(was) * (probs(was).log() - probs(now).log())).sum())
        assert row["kl"] == pytest.approx(wanted, abs=1e-4) and row["kl_before"] == 0
        assert row["top1_changed"] == float(was.argmax() != now.argmax())
    assert table["top1_changed"].nunique() == 2, "some change it and some do not"


def test_the_most_likely_token_is_one_of_the_tokens_and_no_row_behind_them(small_tokenizer):
    count = len(small_tokenizer)
    lm = hk.tiny("llama", tokenizer=small_tokenizer, config={"vocab_size": count + 1})
    first = [int(said(lm, ids)[:count].argmax()) for ids in PROMPTS]
    with (
        torch.no_grad()
    ):  # the row that is no token says 4 times what is first after the first prompt
        lm.model.lm_head.weight[count] = 4 * lm.model.lm_head.weight[first[0]]
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    hook = lambda by: hk.steer("resid_post.1", vector, scale=by)  # noqa: E731
    table = hk.sweep(lm, PROMPTS, {"by": [0.0, 0.25, 0.5, 4.0]}, hook, hk.metrics.top1_changed())
    changed, of_all_rows = [], []
    for row, by in zip(table["row"], table["by"], strict=True):
        plain = said(lm, PROMPTS[row])
        handle = lm.model.model.layers[1].register_forward_hook(
            lambda _m, _a, output, by=by: output + by * vector
        )
        moved = said(lm, PROMPTS[row])
        handle.remove()
        changed.append(float(plain[:count].argmax() != moved[:count].argmax()))
        of_all_rows.append(float(plain.argmax() != moved.argmax()))
    assert table["top1_changed"].tolist() == changed != of_all_rows
    assert set(changed) == {0.0, 1.0}


def without_head(lm: hk.LM, ids: list[int], head: int) -> torch.Tensor:
    """What plain transformers says with a head of block 1 cut out by a hook written by hand."""

    def cut(module, args):
        values = args[0].clone()
        values[..., 8 * head : 8 * head + 8] = 0
        return (values,)

    handle = lm.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(cut)
    try:
        return said(lm, ids)
    finally:
        handle.remove()


def test_the_loss_of_a_continuation_is_the_mean_over_its_tokens(small):
    behind = [(8, 9, 10), (11,), (12, 13)]
    table = hk.sweep(
        small,
        PROMPTS,
        {"head": [0, 3]},
        lambda head: hk.ablate(hk.Site("z", 1, head)),
        [hk.metrics.loss(behind), hk.metrics.logit(5)],
    )
    for _, row in table.iterrows():
        ids, more = PROMPTS[int(row["row"])], behind[int(row["row"])]
        steps = [
            probs(without_head(small, [*ids, *more[:n]], int(row["head"])))[more[n]]
            for n in range(len(more))
        ]
        assert row["loss"] == pytest.approx(
            -sum(math.log(step) for step in steps) / len(steps), abs=1e-4
        )
        assert row["logit"] == pytest.approx(
            float(without_head(small, ids, int(row["head"]))[5]), abs=1e-4
        )


def test_the_loss_of_a_text_is_that_of_its_tokens(llama):
    prompt, text = "I like oat milk in my", " coffee. The store"
    ids, more = llama.encode(prompt), llama.encode(text)
    table = hk.sweep(
        llama, prompt, {"by": [0.5]}, lambda by: hk.scale("embed", by, pos=0), hk.metrics.loss(text)
    )
    steps = [probs(said(llama, [*ids, *more[:n]]))[more[n]] for n in range(len(more))]
    assert table["loss_before"].item() == pytest.approx(
        -sum(math.log(step) for step in steps) / len(steps), abs=1e-4
    )


def gap(logits):
    """Between the two largest logits."""
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_a_function_may_say_yes_or_no_or_count(small, kind):
    def first(logits):
        return (logits.argmax(-1) == 5).to(kind)

    def where(logits):
        return logits.argmax(-1).to(kind)

    function = first if kind == torch.bool else where
    table = hk.sweep(
        small, PROMPTS, {"head": [0]}, lambda head: hk.ablate(hk.Site("z", 1, head)), function
    )
    wanted = [int(without_head(small, ids, 0).argmax()) for ids in PROMPTS]
    wanted = [token == 5 for token in wanted] if kind == torch.bool else wanted
    assert table[function.__name__].tolist() == [float(number) for number in wanted]
    assert (
        table[function.__name__].dtype == float
        and table[f"{function.__name__}_delta"].dtype == float
    )


def test_a_function_of_the_logits_is_a_metric_under_its_own_name(small):
    table = hk.sweep(
        small,
        PROMPTS,
        {"head": [1]},
        lambda head: hk.ablate(hk.Site("z", 1, head)),
        [
            gap,
            lambda logits: logits[:, 3],
            functools.partial(gap),
            hk.metrics.prob(5),
            hk.metrics.prob(6),
        ],
    )
    assert [name for name in table.columns if name.endswith("_before")] == [
        "gap_before",
        "metric_before",
        "metric_2_before",
        "prob_before",
        "prob_2_before",
    ]
    cut = [without_head(small, ids, 1) for ids in PROMPTS]
    wanted = [float(each.topk(2).values[0] - each.topk(2).values[1]) for each in cut]
    assert table["gap"].tolist() == table["metric_2"].tolist() == pytest.approx(wanted, abs=1e-4)
    assert table["metric"].tolist() == pytest.approx([float(each[3]) for each in cut], abs=1e-4)
    assert table["prob_2"].tolist() == pytest.approx(
        [float(probs(each)[6]) for each in cut], abs=1e-5
    )


def test_a_function_that_writes_into_its_logits_changes_no_other_metric(small):
    def shuts(logits):
        logits[:, 5] = 1e4
        return logits[:, 6]

    run = hk.forward(small, PROMPTS)
    before = run.logits.clone()
    as_metrics(shuts)[0](run)
    assert torch.equal(run.logits, before)
    grid = {"head": [0, 1]}
    hooks = lambda head: hk.ablate(hk.Site("z", 1, head))  # noqa: E731
    alone = hk.sweep(small, PROMPTS, grid, hooks, hk.metrics.prob(5))
    beside = hk.sweep(small, PROMPTS, grid, hooks, [shuts, hk.metrics.prob(5), hk.metrics.kl()])
    assert beside["prob"].tolist() == alone["prob"].tolist() and (beside["kl_before"] == 0).all()


def test_the_metric_of_what_was_generated_is_that_of_the_prompts_last_token(small):
    run = hk.generate(small, PROMPTS[0], max_new_tokens=3, do_sample=False)
    assert hk.metrics.logit(5)(run).item() == pytest.approx(
        float(said(small, PROMPTS[0])[5]), abs=1e-4
    )


def test_columns_are_counted_where_a_metric_is_there_twice():
    assert column_names(
        [hk.metrics.prob(1), hk.metrics.rank(1), hk.metrics.prob(2), hk.metrics.prob(3)]
    ) == [
        "prob",
        "rank",
        "prob_2",
        "prob_3",
    ]


def test_a_metric_prints_as_the_call_that_made_it():
    assert (
        repr(hk.metrics.logit_diff(" Mary", (" John", 7)))
        == "LogitDiff(right=' Mary', wrong=(' John', 7))"
    )
    assert repr(hk.metrics.kl()) == "KL()"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda run: hk.metrics.prob(320)(run),
            hk.errors.NotOneToken,
            "token 320 was asked for, and the vocabulary has ids 0",
        ),
        (
            lambda run: hk.metrics.prob(" coffee")(run),
            hk.errors.NotOneToken,
            "came without a tokenizer",
        ),
        (
            lambda run: hk.metrics.prob([5, 6])(run),
            hk.errors.BadPrompt,
            "tokens for 2 prompts, and there are 3",
        ),
        (lambda run: hk.metrics.prob(())(run), hk.errors.BadHook, "an empty tuple of tokens"),
        (lambda run: hk.metrics.prob((5, 6, 6, 5))(run), hk.errors.BadHook, "names token 5 twice"),
        (
            lambda run: hk.metrics.prob([[5, 6], 7, 8])(run),
            hk.errors.BadHook,
            r"\[5, 6\] for prompt 0, which is no token",
        ),
        (lambda run: hk.metrics.prob(None)(run), hk.errors.NotOneToken, "None is no token"),
        (
            lambda run: hk.metrics.prob(5)(run, pos=[0, 1]),
            hk.errors.BadHook,
            "the one position of each prompt",
        ),
        (
            lambda run: hk.metrics.prob(5)(run, pos=5),
            hk.errors.OutOfRange,
            "pos=5 was asked for in row 0",
        ),
        (
            lambda run: hk.metrics.kl()(run),
            hk.errors.Unsupported,
            "compares a sweep's cells with no edit",
        ),
        (lambda run: hk.metrics.kl("clean"), hk.errors.BadHook, "reference='clean': give a run"),
        (
            lambda run: hk.metrics.kl(hk.forward(run.lm, PROMPTS[:2]))(run),
            hk.errors.BadPrompt,
            "a reference of 2 rows, and there are 3 prompts",
        ),
        (
            lambda run: hk.metrics.top1_changed()(run),
            hk.errors.Unsupported,
            "a run has none to compare with",
        ),
        (
            lambda run: hk.metrics.loss((8, 9))(run),
            hk.errors.Unsupported,
            "a run has none: see surprisal",
        ),
        (lambda run: hk.metrics.loss("")(run), hk.errors.BadPrompt, "an empty continuation"),
        (
            lambda run: hk.metrics.loss("tea")(run),
            hk.errors.BadPrompt,
            "'tea' is text, and this model came without a tokenizer",
        ),
        (
            lambda run: hk.metrics.loss((8, 320))(run),
            hk.errors.NotOneToken,
            "token 320 was asked for",
        ),
        (
            lambda run: hk.metrics.loss([8, 9, 10])(run),
            hk.errors.BadPrompt,
            "loss was given 8, one token",
        ),
        (
            lambda run: hk.metrics.loss([(8,), (9,)])(run),
            hk.errors.BadPrompt,
            "2 continuations, and there are 3 prompts",
        ),
        (lambda run: as_metrics([]), hk.errors.BadHook, "no metric was given"),
        (lambda run: as_metrics([3]), hk.errors.BadHook, "3 is no metric"),
        (lambda run: as_metrics("prob"), hk.errors.BadHook, "'prob' is no metric"),
        (
            lambda run: as_metrics(lambda logits: logits)[0](run),
            hk.errors.BadEdit,
            r"a tensor \[3\]",
        ),
        (lambda run: as_metrics(lambda logits: 1.0)[0](run), hk.errors.BadEdit, "returned float"),
    ],
)
def test_a_mistake_in_a_metric_says_what_to_do(small, make, error, words):
    run = hk.forward(small, PROMPTS)
    with pytest.raises(error, match=words):
        make(run)


def test_a_dimension_with_the_name_of_a_metrics_column_is_refused(small):
    for name in ("prob", "prob_before", "row"):
        with pytest.raises(hk.errors.BadHook, match="column"):
            hk.sweep(small, PROMPTS, {name: [0]}, lambda **at: hk.ablate("z.0"), hk.metrics.prob(5))

    def row(logits):
        return logits[:, 0]

    with pytest.raises(hk.errors.BadHook, match="the metric row makes one of that name"):
        hk.sweep(small, PROMPTS, {"layer": [0]}, lambda layer: hk.ablate("z.0"), row)
