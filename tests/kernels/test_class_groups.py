"""Groups of classes with equal embeddings: exact, whatever the hash says."""

import pytest
import torch

from hubert_fast.kernels.class_groups import class_groups
from hubert_fast.kernels.unit_rows import unit_rows
from tests.kernels.device import DEVICE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _embeddings(classes, dim, dtype, distinct):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(distinct, dim, generator=generator).to(dtype)
    return rows[torch.randint(0, distinct, (classes,), generator=generator)].to(DEVICE)


def _first_equals(embeddings):
    equal = (embeddings[:, None] == embeddings).all(-1)
    return torch.argmax(equal.to(torch.int32), 1).int()


@DTYPES
@pytest.mark.parametrize(("classes", "dim"), [(1, 1), (37, 5), (70, 33)])
def test_groups_are_the_first_class_with_an_equal_embedding(classes, dim, dtype):
    embeddings = _embeddings(classes, dim, dtype, max(1, classes // 3))
    assert torch.equal(class_groups(embeddings, unit_rows(embeddings).hashes), _first_equals(embeddings))


def test_hashes_that_collide_do_not_matter():
    embeddings = _embeddings(50, 20, torch.float32, 10)
    everything = torch.zeros(50, dtype=torch.int64, device=DEVICE)
    halves = torch.arange(50, device=DEVICE) % 2
    assert torch.equal(class_groups(embeddings, everything), _first_equals(embeddings))
    assert torch.equal(class_groups(embeddings[:1].expand(50, 20).contiguous(), halves), halves.int())


def test_different_embeddings_have_different_hashes():
    embeddings = torch.rand(300, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    embeddings[1] = embeddings[0].flip(0)
    embeddings[2] = -embeddings[0]
    embeddings[3] = embeddings[0]
    embeddings[3, 7] = torch.nextafter(embeddings[0, 7], torch.tensor(2.0, device=DEVICE))
    assert len(unit_rows(embeddings).hashes.unique()) == 300


def test_nothing_equals_an_embedding_that_is_not_a_number():
    embeddings = _embeddings(4, 5, torch.float32, 1)
    embeddings[1:3, 2] = float("nan")
    groups = class_groups(embeddings, unit_rows(embeddings).hashes)
    assert groups.tolist() == [0, 1, 2, 0]
