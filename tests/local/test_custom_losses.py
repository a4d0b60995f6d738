"""Uploaded losses. The official SDK traces and encodes; running the original function is the reference."""

import copy
import math
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from tinkex_py.errors import InvalidData
from tinkex_py.local import LocalOptions
from tinkex_py.local.custom_losses import MAX_NODES, read_graph
from tinkex_py.local.custom_operations import FUNCTIONS, METHODS, cost, tensors_in
from tinkex_py.local.data import EncodedDatum
from tinkex_py.types import AdamParams


def upload(fn, **ranks):
    handle = trace_loss(fn, {"logprobs": 1, **ranks}, "s")
    graph = encode_graph(handle).model_dump()
    inputs = [loss_input.model_dump() for loss_input in handle.inputs]
    return {"session_id": "s", "custom_loss_seq_id": 0, "name": handle.name, "inputs": inputs, "graph": graph}


def node(op, name, target, *args, **kwargs):
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def by_hand(*calls, loss="x", metrics=None):
    """An upload around some calls on `logprobs`, written by hand."""
    output = {"tuple": [{"ref": loss}, {"dict": metrics or {}}]}
    nodes = [node("placeholder", "logprobs", "logprobs"), *calls, node("output", "output", "output", output)]
    return {"name": "hand", "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": nodes}}


P = {"ref": "logprobs"}


def clipped_policy(logprobs, advantages, old):
    ratio = torch.exp(logprobs - old)
    kept = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = -kept.sum() + 0.1 * (logprobs - old).square().mean()
    return loss, {"custom/ratio:mean": ratio.mean().detach(), "custom/tokens:sum": torch.ones_like(ratio).sum()}


def shapes_and_slices(logprobs, advantages, old):
    length = logprobs.shape[0]
    pairs = logprobs[:, None] - old[None, ...]
    weights = F.softmax(advantages, dim=-1)
    late = logprobs[length // 2 :]
    steps = torch.arange(length, device=logprobs.device, dtype=torch.float32) / max(1, 3)
    smooth = (logprobs[1:] - logprobs[:-1]).pow(2).sum() / (length - 1)
    loss = (pairs.relu() @ weights).sum() + late.sum() * math.sqrt(2.0) + (steps * logprobs).sum() + smooth
    return loss, {}


def choices(logprobs, advantages, old):
    up = torch.where(advantages > 0, logprobs, torch.full_like(logprobs, -1.0))
    picked = logprobs[advantages > -10]
    top = torch.topk(logprobs, 2).values if False else torch.logsumexp(logprobs, dim=0)
    huge = torch.masked_fill(logprobs, advantages.isinf(), 0.0)
    cat = torch.cat([up, picked.detach() * logprobs, torch.stack([top, huge.mean()])])
    return cat.sum() + F.softplus(logprobs).mean() + F.huber_loss(logprobs, old, reduction="sum", delta=0.3), {}


def functional(logprobs, advantages, old):
    parts = [
        F.logsigmoid(logprobs).sum(),
        F.relu(advantages - logprobs).sum(),
        F.mse_loss(logprobs, old),
        F.kl_div(logprobs, old, log_target=True, reduction="sum"),
        F.normalize(logprobs, dim=0).sum(),
        torch.special.xlogy(torch.exp(logprobs), torch.exp(old)).sum(),
        torch.linalg.vector_norm(logprobs - old),
        torch.cumsum(logprobs, 0).std(),
        logprobs.flip(0).dot(advantages),
        F.pad(logprobs, (1, 0)).sum(),
        torch.clamp(logprobs, min=-2.0).exp().sum().log(),
        abs(logprobs).sum() ** 2,
        torch.sort(logprobs)[0][0],
    ]
    return sum(parts[1:], parts[0]), {}


@pytest.mark.parametrize("fn", [clipped_policy, shapes_and_slices, choices, functional])
@pytest.mark.parametrize("seed", range(3))
def test_a_graph_computes_what_the_function_computes(fn, seed):
    rng = np.random.default_rng(seed)
    length = 2 + 3 * seed
    arrays = [torch.tensor(rng.normal(-1, 1, length), dtype=torch.float32) for _ in range(3)]
    graph = read_graph(upload(fn, advantages=1, old=1))
    leaves = [arrays[0].clone().requires_grad_() for _ in range(2)]
    got, got_metrics = graph.compute([leaves[0], *arrays[1:]])
    want, want_metrics = fn(leaves[1], *arrays[1:])
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert got_metrics == pytest.approx({key: float(value) for key, value in want_metrics.items()})
    (got_gradient,), (want_gradient,) = (
        torch.autograd.grad(v, leaf) for v, leaf in zip((got, want), leaves, strict=True)
    )
    torch.testing.assert_close(got_gradient, want_gradient)


def pieces(logprobs, advantages, old):
    halves = torch.chunk(logprobs, 2)[0].sum() + torch.split(old * logprobs, 2)[0].sum() + logprobs.unbind()[1]
    return halves + torch.topk(logprobs, 2).values.sum() + logprobs.sort().values[0], {}


def data_decides(logprobs, advantages, old):
    up = advantages > 0
    places = torch.where(up)[0]
    spread = F.gaussian_nll_loss(logprobs, old, old.abs() + 0.1)
    return logprobs[up].sum() + logprobs[places].square().sum() + logprobs.masked_select(~up).sum() + spread, {}


@pytest.mark.parametrize("fn", [pieces, data_decides])
def test_many_results_and_results_that_the_data_decide(fn):
    arrays = [torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([-1.5] * 4)]
    got, _ = read_graph(upload(fn, advantages=1, old=1)).compute(arrays)
    want, _ = fn(*arrays)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


VECTOR = torch.linspace(-0.9, -0.1, 6)
MATRIX = VECTOR.reshape(2, 3)
SAMPLES = [
    (VECTOR,), (MATRIX,), (VECTOR, VECTOR), (MATRIX, MATRIX), (VECTOR, VECTOR, VECTOR.abs()), (MATRIX, MATRIX.T),
    (MATRIX[None], MATRIX.T[None]), (VECTOR > 0, VECTOR > 0), (VECTOR < -0.5,), (VECTOR < -0.5, VECTOR, VECTOR),
    (VECTOR, VECTOR < -0.5), (VECTOR, VECTOR < -0.5, 0.0), (VECTOR.sigmoid(), VECTOR.sigmoid()), ([VECTOR, VECTOR],),
    (VECTOR, 0), (MATRIX, 0), (MATRIX, 1, 1), (MATRIX, 0, 1), (MATRIX, 1, 2), (VECTOR, 0, 1, 2), (VECTOR, 2),
    (VECTOR, 0.5), (VECTOR, 0, torch.tensor([0, 1])), (VECTOR, 0, [2, 3]), (MATRIX, [1, 0]), (VECTOR, [2, 3]),
    (VECTOR, [6]), (MATRIX, 2.0, 0, 1.0), (VECTOR, (1, 1)), (VECTOR, torch.float64), (VECTOR, "shape"), (5,),
    ([2, 2], 1.0), (VECTOR.sum(),), (2.0,), (2.0, 1.0), (0.5,),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function"), [*FUNCTIONS.items(), *METHODS.items()])
@pytest.mark.filterwarnings("ignore")
def test_a_call_never_gives_more_than_it_was_said_to_cost(name, function):
    ran = 0
    for arguments in SAMPLES:
        try:
            result = function(*arguments)
            told = cost(function, arguments, {})
        except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, InvalidData):
            continue
        ran += 1
        assert told >= sum(tensor.numel() for tensor in tensors_in(result)), arguments
    assert ran, "no sample is an argument of it"


def test_a_mask_and_numbers_are_no_index_together():
    index = {"tuple": [{"ref": "mask"}, {"ref": "numbers"}]}
    calls = [
        node("call_method", "table", "reshape", P, 2, 2),
        node("call_function", "all", "operator.lt", P, 0),
        node("call_function", "mask", "operator.getitem", {"ref": "all"}, {"slice": [0, 2, None]}),
        node("call_function", "numbers", "torch.arange", 2),
        node("call_function", "x", "operator.getitem", {"ref": "table"}, index),
    ]
    with pytest.raises(InvalidData, match="an index cannot combine a mask and whole numbers"):
        read_graph(by_hand(*calls)).compute([torch.full((4,), -1.0)])


def test_scalar_and_matrix_inputs():
    def loss(logprobs, scale, table):
        return scale * (logprobs * table).sum(dim=-1).mean(), {}

    handle = trace_loss(loss, {"logprobs": 2, "scale": 0, "table": 2}, "s")
    fields = {
        "name": "l",
        "inputs": [item.model_dump() for item in handle.inputs],
        "graph": encode_graph(handle).model_dump(),
    }
    value, _ = read_graph(fields).compute([torch.ones(3, 2), torch.tensor(2.5), torch.tensor([[1.0, 2.0]] * 3)])
    assert value.item() == 7.5


REFUSED = {
    "unknown function": (node("call_function", "x", "os.system", "true"), "function 'os.system' is not among"),
    "builtin": (node("call_function", "x", "builtins.eval", "1"), "function 'builtins.eval' is not among"),
    "walk": (node("call_function", "x", "torch.nn.functional.torch.exp", P), "is not among"),
    "random": (node("call_function", "x", "torch.rand", 3), "function 'torch.rand' is not among"),
    "load": (node("call_function", "x", "torch.load", "/etc/passwd"), "function 'torch.load' is not among"),
    "in place": (node("call_method", "x", "add_", P, 1), "method 'add_' is not among"),
    "dunder": (node("call_method", "x", "__class__", P), "method '__class__' is not among"),
    "to the host": (node("call_method", "x", "item", P), "method 'item' is not among"),
    "backward": (node("call_method", "x", "backward", P), "method 'backward' is not among"),
    "storage": (node("call_method", "x", "as_strided", P, [10**9], [1]), "method 'as_strided' is not among"),
    "module": (node("call_module", "x", "linear", P), r"graph.nodes.1.op: Input should be"),
    "attribute node": (node("get_attr", "x", "weight"), r"graph.nodes.1.op: Input should be"),
    "out": (node("call_function", "x", "torch.exp", P, out=P), "argument 'out' is not allowed"),
    "inplace": (node("call_function", "x", "torch.nn.functional.relu", P, inplace=True), "argument 'inplace'"),
    "later": (node("call_function", "x", "torch.exp", {"ref": "y"}), "'ref': 'y' is unknown or not allowed"),
    "itself": (node("call_function", "x", "torch.exp", {"ref": "x"}), "'ref': 'x' is unknown or not allowed"),
    "dtype": (node("call_method", "x", "to", P, {"dtype": "complex64"}), "'dtype': 'complex64'"),
    "encoding": (node("call_function", "x", "torch.exp", {"code": "1"}), "'code': '1' is unknown or not allowed"),
    "two keys": (node("call_function", "x", "torch.exp", {"ref": "logprobs", "tuple": []}), "an unknown encoding"),
    "deep": (node("call_function", "x", "torch.exp", [[[[[[[[P]]]]]]]]), "nested more than 6 deep"),
    "long": (node("call_function", "x", "torch.cat", [P] * 257), "a list has 257 items"),
    "text": (node("call_function", "x", "torch.exp", "a" * 65), "more than 64 characters"),
    "number": (node("call_function", "x", "operator.mul", 2**60, P), "beyond 9007199254740992"),
    "name": (node("call_function", "logprobs", "torch.exp", P), "is used twice"),
    "bad name": (node("call_function", "a b", "torch.exp", P), "graph.nodes.1.name: String should match"),
    "late placeholder": (node("placeholder", "x", "x"), "placeholders .* are not its inputs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_allowed_is_refused_at_upload(case):
    call, message = REFUSED[case]
    with pytest.raises(InvalidData, match=message):
        read_graph(by_hand(call))


def changed(path, value):
    fields = upload(clipped_policy, advantages=1, old=1)
    target = fields
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return fields


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["graph", "format"], 2, "graph.format"),
        (["graph", "nodes"], [], "placeholders \\[\\] are not its inputs"),
        (["graph", "nodes"], "many", "graph.nodes"),
        (["inputs"], [], "inputs: List should have at least 1"),
        (["inputs"], [{"name": f"n{i}", "rank": 1} for i in range(17)], "inputs: List should have at most 16"),
        (["inputs", 0], {"name": "logprobs", "rank": 0}, "the first input must be logprobs"),
        (["inputs", 1], {"name": "Advantages", "rank": 1}, "inputs.1.name: String should match"),
        (["inputs", 1], {"name": "old", "rank": 1}, "two inputs have the same name"),
        (["inputs", 1], {"name": "other", "rank": 1}, "are not its inputs"),
        (["inputs", 1, "rank"], 3, "inputs.1.rank"),
        (["graph", "nodes", -1, "args"], [], "the output must be"),
        (["graph", "nodes", -1, "args"], [{"tuple": [1.0, {"dict": {}}]}], "the output must be"),
        (["graph", "nodes", -1, "args", 0, "tuple", 1, "dict"], {"loss:sum": P}, "metric 'loss:sum' must be named"),
        (["graph", "nodes", -1, "args", 0, "tuple", 1, "dict"], {"custom/a:sum": 1}, "must be a tensor"),
        (["graph", "nodes", -1, "op"], "call_method", "the last node must be the output"),
    ],
)
def test_malformed_uploads_are_named(path, value, message):
    with pytest.raises(InvalidData, match=message):
        read_graph(changed(path, value))


def test_too_many_nodes():
    calls = [node("call_function", f"x{i}", "torch.exp", P) for i in range(MAX_NODES)]
    with pytest.raises(InvalidData, match=f"at most {MAX_NODES}"):
        read_graph(by_hand(*calls, loss="x0"))


BOMBS = {
    "zeros": (node("call_function", "x", "torch.zeros", 10**12),),
    "full": (node("call_function", "x", "torch.full", [10**6, 10**6], 1.0),),
    "arange": (node("call_function", "x", "torch.arange", 10**12),),
    "many steps": (node("call_function", "x", "torch.arange", 0, 1, 1e-12),),
    "outer": (node("call_function", "x", "torch.outer", P, P),),
    "matmul": (
        node("call_method", "a", "reshape", P, -1, 1),
        node("call_method", "b", "reshape", P, 1, -1),
        node("call_function", "x", "operator.matmul", {"ref": "a"}, {"ref": "b"}),
    ),
    "broadcast": (
        node("call_method", "a", "unsqueeze", P, 1),
        node("call_function", "x", "operator.sub", {"ref": "a"}, P),
    ),
    "broadcast mask": (
        node("call_method", "a", "unsqueeze", P, 1),
        node("call_function", "b", "operator.lt", {"ref": "a"}, 0),
        node("call_function", "x", "torch.masked_select", P, {"ref": "b"}),
    ),
    "expand": (node("call_method", "x", "expand", P, 10**5, -1),),
    "repeat": (node("call_method", "x", "repeat", P, 10**9),),
    "pad": (node("call_function", "x", "torch.nn.functional.pad", P, [10**12, 0]),),
    "select": (
        node("call_method", "i", "long", {"ref": "zero"}),
        node("call_function", "x", "torch.index_select", {"ref": "wide"}, 1, {"ref": "i"}),
    ),
    "power": (node("call_function", "x", "operator.pow", 10, 10**9),),
    "product": tuple(
        node("call_function", f"x{i}" if i < 3 else "x", "operator.mul", *([2**52] * 2 if i == 0 else [2, 2]))
        for i in range(4)
    ),
    "list": (node("call_function", "x", "operator.mul", [0], 10**9),),
    "text": (node("call_function", "x", "operator.mod", "%1000000000d", 1),),
    "on the way to a small result": (
        node("call_method", "a", "unsqueeze", P, 1),
        node("call_function", "x", "torch.nn.functional.mse_loss", {"ref": "a"}, P),
    ),
    "product of batches": (
        node("call_method", "a", "reshape", P, -1, 1, 100),
        node("call_method", "b", "reshape", P, 1, 100, -1),
        node("call_function", "x", "torch.matmul", {"ref": "a"}, {"ref": "b"}),
    ),
    "on a named device": (node("call_function", "x", "torch.zeros", 10**12, device="cpu"),),
    "on a numbered device": (node("call_function", "x", "torch.zeros", 10**12, device=0),),
    "many tensors": (node("call_method", "x", "unbind", P),),
    "many pieces": (node("call_function", "x", "torch.split", P, 1),),
    "many chunks": (node("call_method", "x", "chunk", P, 10**6),),
    "growth": tuple(
        node("call_function", f"x{i}" if i < 39 else "x", "torch.cat", [{"ref": f"x{i - 1}" if i else "logprobs"}] * 2)
        for i in range(40)
    ),
}


@pytest.mark.parametrize("case", BOMBS)
@pytest.mark.filterwarnings("ignore")
def test_no_graph_gets_more_memory_or_time_than_it_was_given(case):
    calls = list(BOMBS[case])
    if case == "select":
        calls = [
            node("call_method", "zero", "mul", P, 0.0),
            node("call_method", "wide", "reshape", P, -1, 1),
            *calls,
        ]
    graph = read_graph(by_hand(*calls))
    # 10^5 positions: everything above would be 10^10 elements, or a number with a billion digits.
    with pytest.raises(
        InvalidData, match=r"node 'x\d*' .*(more than 67108864 elements|beyond|takes start|Overflow|operands|range)"
    ):
        graph.compute([torch.full((10**5,), -1.0)])


def test_budget_is_for_the_whole_run():
    calls = [node("call_method", "a", "unsqueeze", P, 1)]
    calls += [node("call_function", f"x{i}", "operator.sub", {"ref": "a"}, P) for i in range(20)]
    graph = read_graph(by_hand(*calls, node("call_method", "x", "sum", {"ref": "x19"})))
    graph.compute([torch.zeros(1000)])  # 20 million elements
    with pytest.raises(InvalidData, match="more than 67108864 elements"):
        graph.compute([torch.zeros(3000)])  # 9 million each: the eighth is too much


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([node("call_method", "x", "exp", P)], r"without dimensions, not a tensor \(3,\)"),
        ([node("call_method", "x", "size", P, 0)], "not int"),
        ([node("call_method", "a", "sum", P), node("call_method", "x", "long", {"ref": "a"})], "of torch.int64"),
        ([node("call_method", "x", "sum", P, dim=4)], r"node 'x' \(sum\): IndexError"),
        ([node("call_method", "x", "sum", P, unknown=4)], r"node 'x' \(sum\): TypeError"),
        ([node("call_function", "x", "getattr", P, "grad_fn")], "attribute 'grad_fn' is not allowed"),
        ([node("call_function", "x", "getattr", P, "__class__")], "attribute '__class__' is not allowed"),
        ([node("call_method", "s", "size", P), node("call_method", "x", "sum", {"ref": "s"})], "a method of tensors"),
        ([node("call_function", "x", "math.sqrt", -1.0)], "ValueError"),
    ],
)
def test_what_fails_while_running_names_its_node(calls, message):
    with pytest.raises(InvalidData, match=message):
        read_graph(by_hand(*calls)).compute([torch.tensor([-1.0, -2.0, -3.0])])


def test_inputs_stay_as_they_were():
    """Even an in-place flag that comes by position reaches only the run's own copies."""
    graph = read_graph(
        by_hand(
            node("call_method", "a", "mul", P, 1.0),
            node("call_function", "b", "torch.nn.functional.relu", {"ref": "a"}, True),
            node("call_method", "x", "sum", {"ref": "b"}),
        )
    )
    values = torch.tensor([-1.0, 2.0])
    assert graph.compute([values])[0].item() == 2.0
    assert values.tolist() == [-1.0, 2.0]


def any_argument(random, names, depth=0):
    draw = random.random()
    if draw < 0.55 or depth > 1:
        return {"ref": random.choice(names)}
    if draw < 0.8:
        plain = [0, 1, -1, 2, 0.5, 1e30, 10**9, 2**50, True, None, "sum", "mean", "none", "constant", "fro", "cpu"]
        return random.choice(plain)
    if draw < 0.93:
        items = [any_argument(random, names, depth + 1) for _ in range(random.randint(0, 3))]
        return items if draw < 0.88 else {"tuple": items}
    encoded = [{"slice": [1, None, None]}, {"ellipsis": True}, {"float": "nan"}, {"dtype": "int64"}, {"device": "cuda"}]
    return random.choice(encoded)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")
def test_any_graph_of_allowed_operations_runs_or_is_the_users_mistake(seed):
    """Random operations on random arguments: never another exception, and never more elements than the budget."""
    random = Random(seed)
    operations = [("call_function", name) for name in sorted(FUNCTIONS)]
    operations += [("call_method", name) for name in sorted(METHODS)]
    keywords = ("dim", "keepdim", "dtype", "min", "max", "reduction", "alpha", "value", "k", "n", "p", "size", "pad")
    outcomes = {"ran": 0, "refused": 0}
    for _ in range(1000):
        names, calls = ["logprobs"], []
        for index in range(random.randint(1, 4)):
            kind, target = random.choice(operations)
            others = [any_argument(random, names) for _ in range(random.choice([0, 0, 1, 1, 2]))]
            named = {random.choice(keywords): any_argument(random, names) for _ in range(random.choice([0, 0, 0, 1]))}
            calls.append(node(kind, f"x{index}", target, {"ref": random.choice(names)}, *others, **named))
            names.append(f"x{index}")
        calls.append(node("call_method", "x", "sum", {"ref": names[-1]}))
        try:
            read_graph(by_hand(*calls)).compute([torch.linspace(-3, -1, 50).requires_grad_()])
            outcomes["ran"] += 1
        except InvalidData:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_the_tables_hold_nothing_dangerous():
    for name in [*FUNCTIONS, *METHODS]:
        last = name.rpartition(".")[2]
        assert not last.endswith("_") or name in ("operator.and_", "operator.or_"), name
        assert not any(
            word in last for word in ("rand", "load", "save", "exec", "eval", "import", "compile", "set_", "apply")
        )
    assert not {"item", "numpy", "tolist", "backward", "data_ptr", "storage", "register_hook", "map_", "apply_"} & set(
        METHODS
    )


# In the engine


def train_a_little(bench, model_id, kit):
    bench.passed(model_id, [kit.datum(7, 90)])
    bench.engine.optim_step(model_id, AdamParams(learning_rate=0.02))


@pytest.mark.parametrize("keep", [False, True])
def test_a_pass_with_an_uploaded_loss_is_the_custom_step_in_one(bench_with, kit, keep):
    """Reference: forward, the function in plain torch, and cross_entropy with weights = -gradient."""
    bench = bench_with(max_tokens_per_microbatch=8)
    data = [kit.datum(n, n, advantages=np.linspace(-1, 1, n), old=np.full(n, -4.0)) for n in (4, 6, 3)]
    for name in ("s:train:0", "s:train:1"):
        bench.create(name)
        train_a_little(bench, name, kit)
    loss_id = bench.engine.custom_losses.add("s", 0, upload(clipped_policy, advantages=1, old=1))
    if keep:
        bench.passed("s:train:0", data, forward_only=True, keep=True)
    got = bench.passed("s:train:0", data, "custom", loss_id=loss_id)
    forward = bench.passed("s:train:1", data, forward_only=True).logprobs
    weighted, total, ratios = [], 0.0, []
    for datum, logprobs in zip(data, forward, strict=True):
        leaf = torch.tensor(logprobs, requires_grad=True)
        loss, metrics = clipped_policy(
            leaf, torch.tensor(datum.inputs["advantages"]), torch.tensor(datum.inputs["old"])
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        inputs = {"target_tokens": datum.inputs["target_tokens"], "weights": -gradient.numpy()}
        weighted.append(EncodedDatum(datum.tokens, inputs))
        total += loss.item()
        ratios.append(float(metrics["custom/ratio:mean"]))
    bench.passed("s:train:1", weighted)
    assert got.metrics == pytest.approx(
        {"loss:sum": total, "custom/ratio:mean": sum(ratios) / 3, "custom/tokens:sum": 13.0}, rel=1e-5
    )
    gradients = [bench.engine.gradient(name) for name in ("s:train:0", "s:train:1")]
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-4, atol=1e-5)
    only = bench.passed("s:train:1", data, "cross_entropy", forward_only=True)
    for a, b in zip(got.logprobs, only.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "inputs", "message"),
    [
        (lambda logprobs, a: (a.sum(), {}), {"a": [1.0, 1.0]}, "does not depend on logprobs"),
        (lambda logprobs, a: ((logprobs.detach() * a).sum(), {}), {"a": [1.0, 1.0]}, "does not depend on logprobs"),
        (lambda logprobs, a: (logprobs.sum() + a.sum(), {}), {}, "needs a; got"),
        (lambda logprobs, a: (logprobs.sum() + a.sum(), {}), {"a": [[1.0], [1.0]]}, r"a has shape \(2, 1\), .* 1 dim"),
        (lambda logprobs, a: (logprobs.sum() / (a - a).sum(), {}), {"a": [1.0, 1.0]}, "not finite"),
        (
            lambda logprobs, a: ((logprobs - logprobs.detach()).sqrt().sum() + a.sum(), {}),
            {"a": [1.0, 1.0]},
            "not finite",
        ),
        (lambda logprobs, a: (logprobs[a.shape[0]], {}), {"a": [1.0, 1.0]}, "IndexError"),
    ],
)
def test_a_loss_that_fails_leaves_no_gradient(bench, kit, fn, inputs, message):
    bench.create("s:train:0")
    fn.__name__ = "fn"
    loss_id = bench.engine.custom_losses.add("s", 0, upload(fn, a=1))
    with pytest.raises(InvalidData, match=message):
        bench.passed("s:train:0", [kit.datum(2, 1, **inputs)], "custom", loss_id=loss_id)
    assert bench.engine.gradient("s:train:0") == {}


def test_a_loss_belongs_to_its_session(bench, kit):
    bench.create("s:train:0")
    bench.create("t:train:0")
    loss_id = bench.engine.custom_losses.add("s", 0, upload(lambda_sum()))
    bench.passed("s:train:0", [kit.datum(2, 1)], "custom", loss_id=loss_id)
    for model_id, config in (("t:train:0", {"loss_id": loss_id}), ("s:train:0", {"loss_id": "s:loss:9"})):
        with pytest.raises(InvalidData, match="this session has no loss"):
            bench.passed(model_id, [kit.datum(2, 1)], "custom", **config)
    with pytest.raises(InvalidData, match=r"exactly one option, loss_id, a text; got \['beta'\]"):
        bench.passed("s:train:0", [kit.datum(2, 1)], "custom", beta=1.0)
    bench.engine.custom_losses.forget("s")
    with pytest.raises(InvalidData, match="this session has no loss"):
        bench.passed("s:train:0", [kit.datum(2, 1)], "custom", loss_id=loss_id)


def lambda_sum():
    def total(logprobs):
        return logprobs.sum(), {}

    return total


def test_the_least_recently_used_losses_go(bench):
    losses = bench.engine.custom_losses
    fields = upload(lambda_sum())
    first = losses.add("s", 0, fields)
    second = losses.add("s", 1, fields)
    for number in range(2, 256):
        losses.add("s", number, fields)
    losses.find("s", {"loss_id": first})
    losses.add("s", 256, fields)
    losses.find("s", {"loss_id": first})
    with pytest.raises(InvalidData, match="has no loss"):
        losses.find("s", {"loss_id": second})


# Over the wire


@pytest.mark.asyncio
async def test_upload_and_use_over_the_wire(run_service, kit):
    async with run_service(LocalOptions(custom_losses=True)) as client:
        assert (await client.ask("client/config"))["custom_loss_server_side"] is True
        model_id = await client.model()
        body = {**upload(clipped_policy, advantages=1, old=1), "session_id": client.session_id}
        first = await client.ask("create_custom_loss", body)
        loss_id = (await client.final(first["request_id"])).json()["loss_id"]
        assert (await client.ask("create_custom_loss", body))["request_id"] == first["request_id"]
        other = copy.deepcopy(body)
        other["name"] = "another"
        refused = await client.post("create_custom_loss", other)
        assert refused.status_code == 400
        assert "custom_loss_seq_id number 0" in refused.json()["detail"]
        message = kit.message(model_id, 1, [kit.datum(3, 1, advantages=[1.0] * 3, old=[-2.0] * 3)], "custom")
        message.loss_fn_config_v2["loss_id"].text = loss_id
        output = await client.pass_result(message)
        assert sorted(output.metrics) == ["custom/ratio:mean", "custom/tokens:sum", "loss:sum"]
        bad = {**by_hand(node("call_function", "x", "os.system", "ls")), "session_id": client.session_id}
        answer = await client.done("create_custom_loss", {**bad, "custom_loss_seq_id": 1})
        assert answer["category"] == "user"
        assert "custom loss 'hand': node 'x': function 'os.system'" in answer["error"]
        lost = await client.post("create_custom_loss", {**body, "session_id": "gone"})
        assert lost.status_code == 404


@pytest.mark.asyncio
async def test_uploads_are_off_unless_switched_on(client):
    assert "custom_loss_server_side" not in await client.ask("client/config")
    await client.session()
    refused = await client.post("create_custom_loss", {"session_id": client.session_id, "custom_loss_seq_id": 0})
    assert refused.status_code == 404
    assert "start it with custom_losses=True" in refused.json()["detail"]
    deep = await client.http.post("/api/v1/create_session", content=b"[" * 10**5)
    assert deep.status_code == 400
