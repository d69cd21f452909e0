"""The first wrong call of a newcomer, for every loss: one short error that says what is meant."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

from fastkd.losses import (
    CRD,
    DKD,
    NKD,
    DistillationLoss,
    FeatureKD,
    LiftKD,
    MapDistance,
    SoftKD,
    ViTKD,
    registry,
)
from fastkd.ops.checks import describe
from fastkd.tokens import Tokens

LOGITS = {"student": torch.zeros(8, 100), "teacher": torch.zeros(8, 100)}
MAPS = {"student": torch.zeros(8, 16, 6), "teacher": torch.zeros(8, 16, 10)}
LABELS = torch.zeros(8, dtype=torch.long)
SAME = MAPS["student"], MAPS["student"]
GRID = (4, 4)


def tokens(x: torch.Tensor) -> dict[int, Tokens]:
    return {0: Tokens(x, GRID)}


def needed(cls: type) -> dict[str, int]:
    """The widths, where a class needs them."""
    needs = cls is LiftKD or getattr(cls, "needs_widths", False)
    return {"student_dim": 6, "teacher_dim": 10} if needs else {}


LOGIT_LOSSES = {entry.name: entry.load() for entry in registry.LOGIT_LOSSES}
DISTANCE_CLASSES = {
    cls.__name__: cls
    for cls in (*(e.load() for e in registry.FEATURE_LOSSES if not e.projects), LiftKD)
}
DISTANCES = {name: partial(cls, **needed(cls)) for name, cls in DISTANCE_CLASSES.items()}
TERMS = {
    "feature": lambda: FeatureKD("mse", [(0, 0)], 1.0, "linear", {0: 6}, {0: 10}),
    **{
        entry.name: partial(entry.load(), [(0, 0)], 1.0, {0: 6}, {0: 10})
        for entry in registry.FEATURE_LOSSES
        if entry.projects
    },
}


def sides(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    narrow = getattr(DISTANCE_CLASSES.get(name), "equal_widths", False)
    return SAME if narrow else (MAPS["student"], MAPS["teacher"])


def refused(call, *words: str) -> None:
    """An error of ours: it names the loss, is short, and prints no tensor."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message) < 300, message
    assert "tensor(" not in message and "\n" not in message


CLASSES = {
    **{cls.__name__: cls for cls in LOGIT_LOSSES.values()},
    **DISTANCE_CLASSES,
    **{cls.__name__: cls for cls in (FeatureKD, DistillationLoss)},
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("inputs", ["tensors", "tokens", "one"])
def test_inputs_given_to_the_constructor(name, inputs):
    x = MAPS["student"]
    arguments = {"tensors": (x, x), "tokens": (Tokens(x, GRID),) * 2, "one": (x,)}[inputs]
    if inputs == "one" and needed(CLASSES[name]):
        arguments = (6, x)
    refused(lambda: CLASSES[name](*arguments), name)


def test_tensors_given_to_the_constructor_of_vitkd():
    refused(lambda: ViTKD(*SAME, {0: 6}, {0: 10}), "ViTKD: pairs")
    refused(lambda: ViTKD([(0, 0)], 1.0, 6, 10), "ViTKD: student_dims", "int 6")


@pytest.mark.parametrize("term", [SoftKD, FeatureKD, MapDistance, "soft", nn.MSELoss()], ids=str)
def test_a_sum_of_what_are_no_terms(term):
    refused(lambda: DistillationLoss(term), "DistillationLoss: logit must be a LogitTerm")
    refused(lambda: DistillationLoss(None, term), "DistillationLoss: feature must be a FeatureTerm")


def test_the_terms_of_a_sum_the_wrong_way_round():
    refused(
        lambda: DistillationLoss(FeatureKD(), SoftKD()), "logit must be a LogitTerm", "FeatureKD"
    )


@pytest.mark.parametrize("loss", [nn.MSELoss, MapDistance, None, 0.2, ["mse"]], ids=str)
def test_a_distance_that_is_neither_word_nor_module(loss):
    refused(lambda: FeatureKD(loss), "FeatureKD: loss must be one of")


@pytest.mark.parametrize(
    "pairs", [(11, 23), "11:23", 11, None, {11: 23}, [(11,)], [(11, 23, 5)], [[1.0, 2.0]]], ids=str
)
def test_pairs_that_are_none(pairs):
    refused(lambda: FeatureKD("mse", pairs), "FeatureKD: pairs")


NUMBERS = ["weight", "tau", "beta", "eps", "power", "patches", "dim", "temperature", "gamma"]
WITH = {  # of an option that is one of another option's
    ("MapDistance", "beta"): {"loss": "smooth_l1"},
    ("VkD", "eps"): {"normalize": "whiten"},
}
OPTIONS = [
    (name, option)
    for name, cls in CLASSES.items()
    for option in NUMBERS
    if option in inspect.signature(cls).parameters
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("value", ["1", [1.0], True], ids=str)
def test_options_of_another_type(name, option, value):
    options = {**needed(CLASSES[name]), **WITH.get((name, option), {}), option: value}
    refused(lambda: CLASSES[name](**options), f"{option} must be", describe(value))


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (torch.zeros(100), torch.zeros(100), ("[B, classes]", "[100]", "unsqueeze")),
        (torch.zeros(8, 1, 100), torch.zeros(8, 1, 100), ("[B, classes]", "[8, 1, 100]")),
        (torch.zeros(8, 6, 4, 4), torch.zeros(8, 6, 4, 4), ("student", "[8, 6, 4, 4]")),
        (torch.zeros(8, 100), torch.zeros(4, 100), ("teacher", "[8, 100]", "[4, 100]")),
        (torch.zeros(8, 100), torch.zeros(8, 10), ("teacher", "[8, 10]", "data set")),
        (torch.zeros(8, 100), LABELS, ("teacher", "int64")),
        (LABELS, torch.zeros(8, 100), ("student", "int64")),
        (torch.zeros(8, 100), torch.zeros(8, 100).long(), ("teacher", "int64")),
        (torch.zeros(8, 100), None, ("teacher", "None")),
        (None, torch.zeros(8, 100), ("student", "None")),
        (torch.zeros(8, 100), torch.zeros(8, 100, device="meta"), ("teacher", "cpu", "meta")),
        ([[0.0] * 100] * 8, torch.zeros(8, 100), ("student", "list")),
        (tokens(torch.zeros(8, 16, 6)), torch.zeros(8, 100), ("student", "dict")),
    ],
)
def test_logits_that_are_none(name, student, teacher, words):
    loss = LOGIT_LOSSES[name]()
    refused(lambda: loss(student, teacher, LABELS), type(loss).__name__, *words)
    if isinstance(student, torch.Tensor) and student.shape == (8, 100):
        sum_ = DistillationLoss(loss)
        refused(lambda: sum_(student, LABELS, teacher), *(words[1:] if teacher is not None else ()))


@pytest.mark.parametrize("name", ["dkd", "nkd"])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        (None, ("None",)),
        ([0] * 8, ("list",)),
        (torch.zeros(8), ("[8]", "float32")),
        (torch.zeros(4, dtype=torch.long), ("[4]",)),
        (torch.zeros(8, 1, dtype=torch.long), ("[8, 1]",)),
        (torch.zeros(8, 10), ("[8, 10]",)),
        (torch.zeros(8, dtype=torch.long, device="meta"), ("meta",)),
    ],
)
def test_labels_that_are_none(name, target, words):
    inputs = LOGITS["student"], LOGITS["teacher"]
    refused(lambda: LOGIT_LOSSES[name]()(*inputs, target), "target", *words)
    refused(lambda: DistillationLoss()(inputs[0], target), "DistillationLoss: target", *words)


def test_labels_and_logits_of_a_sum_the_wrong_way_round():
    refused(lambda: DistillationLoss()(LABELS, LOGITS["student"]), "logits", "int64")
    refused(
        lambda: SoftKD()(LOGITS["student"], LABELS, LOGITS["teacher"]), "teacher logits", "int64"
    )


def test_one_hot_labels_are_those_of_their_class():
    one_hot = nn.functional.one_hot(LABELS + 3, 100)
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    for loss in (DKD(), NKD()):
        assert torch.equal(loss(logits, logits, one_hot), loss(logits, logits, LABELS + 3))
    found, expected = (DistillationLoss()(logits, x)["ce"] for x in (one_hot, LABELS + 3))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_half_against_float_is_compared_in_float32(name):
    loss = LOGIT_LOSSES[name]()
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 100, generator=generator).half() for _ in range(2))
    expected = loss(student.float(), teacher.float(), LABELS)
    assert torch.equal(loss(student, teacher.float(), LABELS), expected)


WRONG_MAPS = [
    (lambda s, t: (s[0], t[0]), "student"),  # no batch
    (lambda s, t: (s[:, 0, 0], t[:, 0, 0]), "student"),
    (lambda s, t: (s, t[:4]), "[4, 16"),
    (lambda s, t: (s, t[:, 1:]), "[8, 15"),
    (lambda s, t: (s.long(), t), "student"),
    (lambda s, t: (s, LABELS), "teacher"),
    (lambda s, t: (None, t), "student"),
    (lambda s, t: (s, None), "teacher"),
    (lambda s, t: (s, t.to("meta")), "meta"),
    (lambda s, t: (s.tolist(), t), "student"),
    (lambda s, t: (tokens(s), tokens(t)), "dict"),
    (lambda s, t: (s.unflatten(1, GRID), t), "[8, "),
]


@pytest.mark.parametrize("wrong", range(len(WRONG_MAPS)))
@pytest.mark.parametrize("name", DISTANCES)
def test_token_maps_that_are_none(name, wrong):
    change, word = WRONG_MAPS[wrong]
    inputs = change(*sides(name))
    if getattr(DISTANCE_CLASSES[name], "takes_embeddings", False) and wrong == 0:
        pytest.skip("takes embeddings [B, D], which a map without a batch looks like")
    loss = DISTANCES[name]()
    refused(lambda: loss(*inputs), word)


@pytest.mark.parametrize("name", [CRD.__name__, LiftKD.__name__])
def test_swapped_maps_of_other_widths(name):
    refused(lambda: DISTANCES[name]()(MAPS["teacher"], MAPS["student"]), "student")


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (MAPS["student"], MAPS["teacher"], ("student must be a dict of Tokens",)),
        (MAPS, MAPS, ("student has no key 0",)),
        ({0: MAPS["student"]}, {0: MAPS["teacher"]}, ("student[0] must be Tokens",)),
        (tokens(MAPS["student"]), tokens(MAPS["teacher"])[0], ("teacher must be a dict", "Tokens")),
        (tokens(MAPS["student"]), None, ("teacher must be a dict", "None")),
        (tokens(MAPS["student"]), {23: tokens(MAPS["teacher"])[0]}, ("teacher has no key 0",)),
        (tokens(MAPS["teacher"]), tokens(MAPS["student"]), ("10",)),
        (tokens(MAPS["student"]), tokens(MAPS["teacher"][:4]), ("batch of 8", "4")),
        (tokens(MAPS["student"]), tokens(MAPS["teacher"].to("meta")), ("meta", "cpu")),
        (tokens(MAPS["student"].long()), tokens(MAPS["teacher"]), ("int64",)),
    ],
)
def test_tokens_that_are_none(name, student, teacher, words):
    term = TERMS[name]()
    refused(lambda: term(student, teacher), *words)


@pytest.mark.parametrize("name", [*DISTANCES, *TERMS])
def test_half_precision_meets_float32(name):
    student, teacher = sides(name)
    if name in TERMS:
        student, teacher = (tokens(x) for x in (student.bfloat16(), teacher))
    else:
        student = student.bfloat16()
    value = {**DISTANCES, **TERMS}[name]()(student, teacher)
    assert value.dtype == torch.float32 and value.isfinite()


ODD = {
    "torch.sparse_coo": lambda x: x.to_sparse(),
    "torch.sparse_csr": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "torch.float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("loss", [*LOGIT_LOSSES, *DISTANCES])
def test_tensors_that_torch_computes_little_with_are_refused(loss, odd):
    student, teacher = LOGITS.values() if loss in LOGIT_LOSSES else sides(loss)
    build = {**LOGIT_LOSSES, **DISTANCES}[loss]
    labels = (LABELS,) if loss in LOGIT_LOSSES else ()
    refused(lambda: build()(student, ODD[odd](teacher), *labels), "teacher", odd)
