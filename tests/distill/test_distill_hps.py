"""HPSv2's weights in transformers' CLIP, against the network that they were trained in."""

import pytest
import torch
from nasa_distill.scores import hps
from nasa_distill.world.model import make_tokenizer
from torch import nn


class Tower(nn.Module):
    """The residual blocks of open_clip's transformer, by their names there."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 40), nn.Linear(40, width)
            self.resblocks.append(block)

    def forward(self, x, mask=None):
        for block in self.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp.c_proj(nn.functional.gelu(block.mlp.c_fc(block.ln_2(x))))
        return x


class OpenClip(nn.Module):
    """Two pixels of a patch, four patches, two layers and two heads in each tower."""

    def __init__(self, words):
        super().__init__()
        self.transformer, self.ln_final = Tower(16, 2, 2), nn.LayerNorm(16)
        self.token_embedding = nn.Embedding(words, 16)
        self.positional_embedding = nn.Parameter(torch.randn(16, 16))
        self.text_projection = nn.Parameter(torch.randn(16, 12))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.visual = nn.Module()
        self.visual.transformer = Tower(24, 2, 3)
        self.visual.conv1 = nn.Conv2d(3, 24, 2, 2, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(24))
        self.visual.positional_embedding = nn.Parameter(torch.randn(5, 24))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(24), nn.LayerNorm(24)
        self.visual.proj = nn.Parameter(torch.randn(24, 12))
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm):
                nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def images(self, pixels):
        net = self.visual
        x = net.conv1(pixels).flatten(2).mT
        x = torch.cat([net.class_embedding.expand(len(x), 1, -1), x], 1) + net.positional_embedding
        return net.ln_post(net.transformer(net.ln_pre(x))[:, 0]) @ net.proj

    def texts(self, tokens):
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        # the last token has the highest number
        return self.ln_final(x[torch.arange(len(x)), tokens.argmax(1)]) @ self.text_projection


@torch.no_grad()
def test_its_weights_give_the_same_embeddings_in_transformers(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    theirs = OpenClip(len(tokenizer)).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "hps.pt")
    ours = hps.load(tmp_path / "hps.pt", tokenizer, heads=(12, 8))
    images = torch.rand(3, 3, 4, 4) * 2 - 1
    expected = theirs.images((images / 2 + 0.5 - ours.mean) / ours.std)
    torch.testing.assert_close(ours.images(images), expected, atol=1e-4, rtol=1e-4)
    prompts = ["a photo of a red circle", "blue", "a large striped square on a white background"]
    tokens = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    torch.testing.assert_close(ours.texts(prompts), theirs.texts(tokens), atol=1e-4, rtol=1e-4)


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {"conv_in.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK")
    for name in ("other.pt", "cut.pt", "missing.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights of HPSv2"):
            hps.load(tmp_path / name, make_tokenizer())
