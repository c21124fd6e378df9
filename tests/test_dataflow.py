import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional

from fxquant.dataflow import bare_matmuls, read_elsewhere, routers, routers_by_structure, siblings, uncalled
from fxquant.graph_capture import capture
from fxquant.linears import find_linears


def test_siblings_of_llama() -> None:
    groups = siblings(capture(tiny_model("llama")))
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        assert (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj") in groups
        assert (f"{mlp}.gate_proj", f"{mlp}.up_proj") in groups
    assert len(groups) == 4


class Readers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        cast = x.to(x.dtype).contiguous()
        y = self.a(x) + self.b(cast) + self.c(x + 1)
        z = self.d(x) + self.e(x)
        return self.e(y) + z


def test_siblings_read_the_same_tensor_each_time() -> None:
    # b reads a no-op of a's input; c another tensor; e is called twice, d once.
    assert siblings(capture(Readers(), torch.randn(2, 4))) == [("a", "b", "d")]


class InBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.q(x) + self.k(x)


def test_nested_graphs_count() -> None:
    model = InBlocks()
    gm = capture(model, torch.randn(2, 4))
    assert uncalled(gm, find_linears(model)) == {}
    assert siblings(gm) == [("q", "k")]


@pytest.mark.parametrize(("kind", "router"), [("jetmoe", "mlp.router.layer"), ("dbrx", "ffn.router.layer")])
def test_routers_that_are_linears(kind: str, router: str) -> None:
    model = tiny_model(kind)
    found = routers(capture(model), find_linears(model))
    wanted = [site.name for site in find_linears(model) if site.name.endswith("router.layer")]
    assert sorted(found) == sorted(wanted)
    assert any(name.endswith(router) for name in found)
    assert all(reason.startswith("it chooses experts (topk in ") for reason in found.values())


@pytest.mark.parametrize("kind", ["switch_transformers", "nllb-moe"])
def test_routers_in_front_of_experts_that_are_linears(kind: str) -> None:
    model = tiny_model(kind, "AutoModelForSeq2SeqLM")
    sites = find_linears(model)
    wanted = sorted(site.name for site in sites if site.name.endswith("router.classifier"))
    assert len(wanted) >= 2
    assert sorted(routers(capture(model), sites)) == wanted


class Mixture(nn.Module):
    """A router of two layers in front of experts that are linears, with shared linears beside them."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.hidden, self.gate = nn.Linear(8, 8), nn.Linear(8, experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))
        self.shared = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.gate(functional.silu(self.hidden(x))) / 2).softmax(-1).reshape(x.shape[0], -1)
        weights, chosen = scores.topk(2, -1)
        total = self.shared(x)
        for i, expert in enumerate(self.experts):
            total = total + expert(x * ((chosen == i) * weights).sum(-1, keepdim=True))
        return total


class Head(nn.Module):
    """An output layer whose argmax is returned, and proposals that are ranked: neither chooses experts."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score, self.head = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        order = self.score(x).squeeze(-1).topk(2, 0).indices
        return self.head(x[order]).softmax(-1).argmax(-1)


def test_only_the_layer_that_chooses_is_a_router() -> None:
    model = Mixture(4)
    found = routers(capture(model, torch.randn(5, 8)), find_linears(model))
    assert found == {"gate": "it chooses experts (topk in Mixture)"}


def test_heads_are_no_routers() -> None:
    model = Head()
    assert routers(capture(model, torch.randn(5, 8)), find_linears(model)) == {}
    llama = tiny_model("llama")
    assert routers(capture(llama), find_linears(llama)) == {}


def test_experts_of_the_next_block_do_not_make_a_router() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Ranking(), Mixture(4)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    class Ranking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.score(x).topk(8, -1).values

    model = Blocks()
    assert list(routers(capture(model, torch.randn(5, 8)), find_linears(model))) == ["blocks.1.gate"]


def test_routers_without_a_graph() -> None:
    assert routers_by_structure(Mixture(4)) == {"gate": "it is a router: gate stands beside experts"}
    assert routers_by_structure(tiny_model("llama")) == {}
    dbrx = tiny_model("dbrx")
    assert sorted(routers_by_structure(dbrx)) == sorted(routers(capture(dbrx), find_linears(dbrx)))
    assert "model.layers.0.feed_forward.router" in routers_by_structure(tiny_model("llama4_text"))


def test_weights_that_other_code_reads() -> None:
    model = tiny_model("mamba")
    found = read_elsewhere(capture(model), find_linears(model))
    assert found["backbone.layers.0.mixer.dt_proj"] == (
        "its weight is read by matmul in backbone.layers.0.mixer (MambaMixer)"
    )
    assert found["lm_head"].startswith("its weight is read by embedding in ")
    assert not any(name.endswith("in_proj") for name in found)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) - self.one.bias + self.two(x)


def test_a_bias_that_other_code_reads() -> None:
    model = Biased()
    found = read_elsewhere(capture(model, torch.randn(2, 4)), find_linears(model))
    assert found == {"one": "its bias is read by sub in Biased"}


def test_multihead_attention_reads_its_projections() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    sites, gm = find_linears(model), capture(model, torch.randn(5, 2, 8))
    assert list(read_elsewhere(gm, sites)) == ["self_attn.out_proj"]
    assert bare_matmuls(gm, sites) == {"self_attn.in_proj_weight": "linear in self_attn (MultiheadAttention)"}
    assert uncalled(gm, sites) == {}


def test_a_linear_that_reads_its_own_weight_is_not_read_elsewhere() -> None:
    model = tiny_model("llama4_text")
    sites, gm = find_linears(model), capture(model)
    assert not any("router" in name for name in read_elsewhere(gm, sites))
    assert bare_matmuls(gm, sites) == {}


def test_routers_with_a_parameter_of_their_own() -> None:
    model = tiny_model("mixtral")
    found = bare_matmuls(capture(model), find_linears(model))
    assert found == {
        f"model.layers.{i}.mlp.gate.weight": f"linear in model.layers.{i}.mlp.gate (MixtralTopKRouter)"
        for i in range(2)
    }


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.table = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(6, 4))
        self.stack, self.vector = nn.Parameter(torch.randn(2, 4, 4)), nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.linear(self.query) @ x.T
        mixed = torch.einsum("bk,hkn->bhn", x, self.stack)
        return (x * self.vector) @ self.table.t().contiguous() + attended.sum() + mixed.sum()


def test_parameters_in_matmuls() -> None:
    model = Bare()
    assert bare_matmuls(capture(model, torch.randn(2, 4)), find_linears(model)) == {
        "table": "matmul in Bare",
        "stack": "einsum in Bare",
    }


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alias = self.used

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(x)


def test_linears_that_are_never_called() -> None:
    model = Unused()
    found = uncalled(capture(model, torch.randn(2, 4)), find_linears(model))
    assert found == {"unused": "the captured graph never calls it"}
    llava = tiny_model("llava", "AutoModelForImageTextToText")
    assert all("vision" in name or "projector" in name for name in uncalled(capture(llava), find_linears(llava)))
