"""ADM U-Net and DiT: numbering, sizes, published names, and what their parts compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headgate.nn.diffusion import ADMUNet, DiT, convert_dit_state_dict, grid_sinusoids, time_sinusoids
from headgate.testing import ContractCase, check_case


def small_unet(**options):
    torch.manual_seed(0)
    return ADMUNet(16, 3, 32, 6, 1, (2,), (1, 2), num_head_channels=32, **options)


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_adm_256_has_the_published_size_and_numbering():
    with torch.device("meta"):
        model = ADMUNet()
    assert sum(p.numel() for p in model.parameters()) == 552_814_086
    assert model.num_blocks == 37
    widths, sides = model.block_channels, [256 // scale for scale in model.block_downsampling]
    assert widths == (256,) * 7 + (512,) * 6 + (1024,) * 12 + (512,) * 6 + (256,) * 6
    expected = [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 6
    expected += [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3 + [256] * 4
    assert sides == expected


def test_numbered_blocks_have_the_stated_maps_and_compose_to_the_output():
    model = randomise(small_unet())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    maps = model.forward_blocks(x, t, range(1, model.num_blocks + 1))
    assert [m.shape[1] for m in maps] == list(model.block_channels)
    assert [16 // m.shape[2] for m in maps] == list(model.block_downsampling)
    torch.testing.assert_close(model.out(maps[-1]), model(x, t))
    assert torch.equal(model.forward_blocks(x, t, [5, 2])[1], maps[1])


def test_what_lies_behind_the_last_wanted_block_is_not_run():
    model = small_unet()
    ran = []
    for index, block in enumerate(model.output_blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.forward_blocks(torch.randn(1, 3, 16, 16), torch.tensor([1]), [len(model.input_blocks) + 2])
    assert ran == [0]


def test_feedback_is_resized_and_added_to_its_input_block():
    model = randomise(small_unet())
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    added = torch.randn(1, model.block_channels[1], 4, 4)
    plain, changed = (model.forward_blocks(x, t, [2, 3], feedback=told) for told in ({}, {2: added}))
    grown = F.interpolate(added, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(changed[0], plain[0] + grown)
    assert not torch.allclose(changed[1], plain[1])
    with pytest.raises(ValueError, match="input blocks"):
        model.forward_blocks(x, t, [2], feedback={9: added})
    with pytest.raises(ValueError, match=r"1\.\."):
        model.forward_blocks(x, t, [0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resblock_updown": False, "use_scale_shift_norm": False, "num_classes": 5},
    ],
)
def test_sizes_are_read_off_published_weights(options):
    model = randomise(ADMUNet(16, 3, 32, 6, 2, (2, 4), (1, 2, 2), num_head_channels=32, **options))
    again = ADMUNet.from_guided_diffusion(model.state_dict(), 16, 32)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 50])
    labels = torch.tensor([1, 4]) if "num_classes" in options else None
    assert torch.equal(again(x, t, labels), model(x, t, labels))
    with pytest.raises(ValueError, match="UNetModel"):
        ADMUNet.from_guided_diffusion({"weight": torch.zeros(1)})


def test_attention_follows_its_definition_in_both_layouts():
    for new in (False, True):
        model = randomise(ADMUNet(8, 3, 32, 6, 1, (1,), (1,), num_head_channels=16, use_new_attention_order=new))
        layer = model.input_blocks[1][1]
        x = torch.randn(1, 32, 3, 3)
        qkv = F.conv1d(layer.norm(x.flatten(2)), layer.qkv.weight, layer.qkv.bias)[0]
        heads = []
        for head in range(2):
            if new:
                q, k, v = (qkv[32 * part + 16 * head :][:16] for part in range(3))
            else:
                q, k, v = qkv[48 * head :][:48].split(16)
            heads.append(v @ torch.softmax(q.T @ k / 4, dim=1).T)
        mixed = torch.cat(heads)[None]
        wanted = x + F.conv1d(mixed, layer.proj_out.weight, layer.proj_out.bias).reshape(x.shape)
        torch.testing.assert_close(layer(x), wanted)


def test_a_fresh_network_predicts_nothing():
    model = small_unet()
    assert not model(torch.randn(1, 3, 16, 16), torch.tensor([7])).any()
    dit = DiT(8, 2, 4, 32, 2, 2, num_classes=3)
    assert not dit(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([3])).any()


def test_time_sinusoids_are_cosines_first():
    waves = time_sinusoids(torch.tensor([0, 3]), 4)
    assert waves[0].tolist() == [1, 1, 0, 0]
    angles = torch.tensor([3.0, 0.03])
    torch.testing.assert_close(waves[1], torch.cat([angles.cos(), angles.sin()]))
    assert time_sinusoids(torch.tensor([1.0]), 5)[0, 4] == 0
    assert time_sinusoids(torch.tensor([1.0], dtype=torch.float64), 4).dtype == torch.float64


def test_grid_sinusoids_tell_column_then_row():
    table = grid_sinusoids(2, 3, 8)[0].reshape(2, 3, 8)
    torch.testing.assert_close(table[1, 2, :2], torch.tensor([2.0, 0.02]).sin())
    torch.testing.assert_close(table[1, 2, 4:6], torch.tensor([1.0, 0.01]).sin())
    assert torch.equal(table[0, :, 4:], table[0, :1, 4:].expand(3, 4))


def test_dit_has_the_published_size_and_names():
    with torch.device("meta"):
        model = DiT(32, 2, 4, 1152, 28, 16, out_channels=8)
    assert sum(p.numel() for p in model.parameters()) == 674_834_720
    small = DiT(8, 2, 4, 32, 2, 2, num_classes=3)
    published = {name.replace(".out_proj.", ".proj."): value for name, value in small.state_dict().items()}
    assert "blocks.1.attn.proj.weight" in published
    assert "y_embedder.embedding_table.weight" in published
    small.load_state_dict(convert_dit_state_dict(published))


def test_dit_puts_patches_where_they_came_from():
    model = DiT(8, 2, 1, 32, 1, 2, num_classes=0)
    with torch.no_grad():
        model.final_layer["linear"].weight.zero_()
        model.final_layer["linear"].bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    y = model(torch.randn(1, 1, 8, 8), torch.tensor([0.1]))
    assert y[0, 0, 2:4, 4:6].tolist() == [[1, 2], [3, 4]]


def test_dit_needs_labels_if_and_only_if_it_has_classes():
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    with pytest.raises(ValueError, match="null label"):
        DiT(8, 2, 4, 32, 1, 2, num_classes=3)(x, t)
    with pytest.raises(ValueError, match="no labels"):
        DiT(8, 2, 4, 32, 1, 2, num_classes=0)(x, t, torch.tensor([0]))
    assert DiT(8, 2, 4, 32, 1, 2, num_classes=3).null_label == 3


def test_dit_keeps_the_promises_of_a_public_module():
    case = ContractCase(
        lambda: DiT(4, 2, 3, 16, 1, 2, num_classes=3),
        lambda generator: (
            torch.randn(3, 3, 4, 4, generator=generator),
            torch.randint(1000, (3,), generator=generator),
            torch.randint(4, (3,), generator=generator),
        ),
    )
    assert check_case(_IntegerTimes.case(case)).count > 0


class _IntegerTimes(torch.nn.Module):
    """A DiT that is told integer steps alone; by itself it takes both."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, timesteps, labels):
        if timesteps.is_floating_point():
            raise TypeError(f"timesteps must be integers, got {timesteps.dtype}")
        return self.model(x, timesteps, labels)

    @classmethod
    def case(cls, case):
        return ContractCase(lambda: cls(case.factory()), case.inputs)
