"""MAE's decoder: fixed positions in closed form, the reference's names and first weights, every token in its place."""

import math

import pytest
import torch
from torch import nn

from sslmed.config import UsageError
from sslmed.models.decoders import JEPAPredictor, MAEDecoder, sine_cosine_positions, truncated, xavier

GRID, WIDTH, VALUES = (3, 5), 16, 12


def decoder(prefix: int = 1, depth: int = 2) -> MAEDecoder:
    torch.manual_seed(0)
    return MAEDecoder(8, GRID, prefix, VALUES, WIDTH, depth, 4)


def test_positions_in_closed_form_with_the_column_first() -> None:
    positions = sine_cosine_positions(WIDTH, GRID)
    assert positions.shape == (15, WIDTH)
    assert positions.dtype == torch.float64
    quarter = WIDTH // 4
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            found = positions[row * GRID[1] + column].tolist()
            wave = [1 / 10000 ** (k / quarter) for k in range(quarter)]
            across = [math.sin(column * w) for w in wave] + [math.cos(column * w) for w in wave]
            down = [math.sin(row * w) for w in wave] + [math.cos(row * w) for w in wave]
            assert found == pytest.approx(across + down, abs=1e-12)


def test_a_width_that_positions_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"18 wide.*multiple of 4"):
        sine_cosine_positions(18, GRID)


def test_names_and_shapes_are_the_references() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder(depth=1).state_dict().items()}
    block = "decoder_blocks.0."
    assert shapes == {
        "mask_token": (1, 1, WIDTH),
        "decoder_pos_embed": (1, 16, WIDTH),
        "decoder_embed.weight": (WIDTH, 8),
        "decoder_embed.bias": (WIDTH,),
        f"{block}norm1.weight": (WIDTH,),
        f"{block}norm1.bias": (WIDTH,),
        f"{block}attn.qkv.weight": (3 * WIDTH, WIDTH),
        f"{block}attn.qkv.bias": (3 * WIDTH,),
        f"{block}attn.proj.weight": (WIDTH, WIDTH),
        f"{block}attn.proj.bias": (WIDTH,),
        f"{block}norm2.weight": (WIDTH,),
        f"{block}norm2.bias": (WIDTH,),
        f"{block}mlp.fc1.weight": (4 * WIDTH, WIDTH),
        f"{block}mlp.fc1.bias": (4 * WIDTH,),
        f"{block}mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        f"{block}mlp.fc2.bias": (WIDTH,),
        "decoder_norm.weight": (WIDTH,),
        "decoder_norm.bias": (WIDTH,),
        "decoder_pred.weight": (VALUES, WIDTH),
        "decoder_pred.bias": (VALUES,),
    }


def test_positions_are_fixed_and_those_of_the_prefix_zero() -> None:
    module = decoder(prefix=3)
    assert not any("pos_embed" in name for name, _ in module.named_parameters())
    assert not module.decoder_pos_embed[0, :3].any()
    assert torch.equal(module.decoder_pos_embed[0, 3:], sine_cosine_positions(WIDTH, GRID).float())


def test_first_weights() -> None:
    module = MAEDecoder(64, (4, 4), 1, VALUES, 256, 1, 4)
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert len(linear) == 6
    for layer in linear:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))  # q, k and v are one matrix
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.bias.any()
    norms = [layer for layer in module.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(norms) == 3
    assert {layer.eps for layer in norms} == {1e-6}
    assert module.mask_token.std().item() == pytest.approx(0.02, rel=0.15)


def test_xavier_draws_over_what_was_there() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.LayerNorm(3, elementwise_affine=False))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(7)
    xavier(layers)
    assert (layers[0].weight != 7).all()
    assert layers[0].bias.tolist() == [0] * 3
    assert (layers[1].weight.tolist(), layers[1].bias.tolist()) == ([1] * 3, [0] * 3)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_visible_tokens_come_to_their_places_and_the_mask_token_to_the_others(prefix: int) -> None:
    module = decoder(prefix)
    module.decoder_blocks = nn.ModuleList()
    tokens = torch.randn(2, prefix + 3, 8)
    keep_ids = torch.tensor([[4, 0, 13], [7, 8, 2]])
    found = module(tokens, keep_ids)
    assert found.shape == (2, 15, VALUES)
    positions = sine_cosine_positions(WIDTH, GRID).float()
    for sample in range(2):
        for place in range(15):
            known = keep_ids[sample].tolist()
            value = module.mask_token[0, 0]
            if place in known:
                value = module.decoder_embed(tokens[sample, prefix + known.index(place)])
            expected = module.decoder_pred(module.decoder_norm(value + positions[place]))
            torch.testing.assert_close(found[sample, place], expected)


def test_the_order_of_the_visible_tokens_does_not_matter() -> None:
    module, tokens, keep_ids = decoder(), torch.randn(2, 5, 8), torch.tensor([[4, 0, 13, 6], [7, 8, 2, 1]])
    turned = torch.tensor([2, 0, 3, 1])
    other = torch.cat([tokens[:, :1], tokens[:, 1:][:, turned]], dim=1)
    torch.testing.assert_close(module(other, keep_ids[:, turned]), module(tokens, keep_ids))


def test_the_prefix_is_heard() -> None:
    module, tokens, keep_ids = decoder(), torch.randn(2, 5, 8), torch.tensor([[4, 0, 13, 6], [7, 8, 2, 1]])
    other = tokens.clone()
    other[:, 0] += 1
    assert not torch.allclose(module(other, keep_ids), module(tokens, keep_ids))


# I-JEPA's predictor.


def predictor(depth: int = 2) -> JEPAPredictor:
    torch.manual_seed(0)
    return JEPAPredictor(8, GRID, WIDTH, depth, 4).double()


def asked(count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of five patches, where they were, and three blocks of two patches."""
    context = torch.randn(count, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    context_ids = torch.tensor([[0, 3, 7, 8, 14], [1, 2, 4, 9, 10]])[:count]
    target_ids = torch.tensor([[[5, 6], [10, 11], [12, 13]], [[0, 5], [6, 7], [13, 14]]])[:count]
    return context, context_ids, target_ids


def test_the_predictors_names_are_the_references() -> None:
    names = {name.split(".")[0] for name in predictor().state_dict()}
    assert names == {
        "predictor_embed",
        "mask_token",
        "predictor_pos_embed",
        "predictor_blocks",
        "predictor_norm",
        "predictor_proj",
    }
    assert torch.equal(predictor().predictor_pos_embed[0].float(), sine_cosine_positions(WIDTH, GRID).float())


def test_each_block_is_predicted_by_itself_in_the_order_that_was_asked() -> None:
    module, (context, context_ids, target_ids) = predictor(), asked()
    with torch.no_grad():
        whole = module(context, context_ids, target_ids)
        assert whole.shape == (2, 3, 2, 8)
        for block in range(3):
            alone = module(context, context_ids, target_ids[:, [block]])
            torch.testing.assert_close(alone[:, 0], whole[:, block])
        turned = module(context, context_ids, target_ids.flip(2))
        torch.testing.assert_close(turned.flip(2), whole)


def test_a_prediction_depends_on_the_contexts_tokens_and_places_not_on_their_order() -> None:
    module, (context, context_ids, target_ids) = predictor(), asked()
    order = torch.tensor([4, 2, 0, 1, 3])
    with torch.no_grad():
        whole = module(context, context_ids, target_ids)
        torch.testing.assert_close(module(context[:, order], context_ids[:, order], target_ids), whole)
        assert not torch.allclose(module(context[:, order], context_ids, target_ids), whole)
        assert not torch.allclose(module(context, context_ids, (target_ids + 1) % 15), whole)


def test_the_predictors_checkpoints_change_no_gradient() -> None:
    found = []
    for checkpoints in (False, True):
        module = predictor()
        module(*asked(), checkpoints=checkpoints).square().sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_truncated_weights_shrink_with_depth_and_grow_for_small_patches() -> None:
    module = nn.Module()
    module.blocks = predictor(depth=3).predictor_blocks
    module.embed = nn.Conv2d(1, 400, 7)
    truncated(module, module.blocks)
    for number, block in enumerate(module.blocks, 1):
        for layer, expected in ((block.attn.qkv, 0.02), (block.mlp.fc2, 0.02 / math.sqrt(2 * number))):
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert not layer.bias.any()
    assert module.embed.weight.std().item() == pytest.approx(1 / 7, rel=0.05)
