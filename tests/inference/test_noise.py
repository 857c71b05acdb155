"""The noise of paths: a function of what a row holds, even over cells, rows and paths."""

import torch

from hetegen_rec.inference.noise import path_noise, row_keys

IDS = torch.randint(-1, 50, (4000, 6), generator=torch.Generator().manual_seed(0))


def noise(ids=IDS, seed=0, path=0):
    return path_noise(row_keys(ids), 5, seed, path)


def test_equal_rows_have_equal_noise_wherever_they_stand():
    index = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise(IDS[index]), noise()[index])


def test_one_other_id_or_the_same_ids_at_other_places_make_another_row():
    other = IDS.clone()
    other[:, 3] += 1
    rotated = IDS.roll(1, dims=1)
    same = (rotated == IDS).all(1)
    assert not (row_keys(other) == row_keys(IDS)).any()
    assert not (row_keys(rotated) == row_keys(IDS))[~same].any()


def test_seeds_and_paths_have_noise_of_their_own():
    assert (noise() == noise(path=1)).float().mean() < 1e-3
    assert (noise() == noise(seed=1)).float().mean() < 1e-3


def test_it_is_even_and_its_cells_are_independent():
    found = noise()
    assert found.min() >= 0.0
    assert found.max() < 1.0
    torch.testing.assert_close(found.mean(0), torch.full((5,), 0.5), atol=0.02, rtol=0)
    assert (torch.corrcoef(found.T) - torch.eye(5)).abs().max() < 0.06
