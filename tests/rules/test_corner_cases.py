"""Corner cases of the rules by cosines: ties, absent ranks, the first voter, sums of zero."""

import math

import pytest
import torch

from gaf_ddp import NeighborhoodAgreement, SequentialAgreement
from tests.gradients import agreeing_gradients, random_gradients
from tests.properties import assert_keeps, gramian_of


class TestNeighborhood:
    def test_keeps_more_as_tau_grows(self) -> None:
        for seed in range(3):
            gramian = gramian_of(random_gradients(7, 200, seed))
            taus = torch.linspace(0, 2, 41).tolist()
            counts = [int((NeighborhoodAgreement(tau)(gramian) != 0).sum()) for tau in taus]
            assert counts == sorted(counts)
            assert counts[-1] == 7

    @pytest.mark.parametrize("bad", range(5))
    def test_leaves_a_flipped_rank_out_whichever_it_is(self, bad: int) -> None:
        gradients = agreeing_gradients(5, 300)
        gradients[bad] *= -1
        assert_keeps(NeighborhoodAgreement(0.9), gramian_of(gradients), [i for i in range(5) if i != bad])

    def test_breaks_ties_by_the_smallest_sum_of_distances(self) -> None:
        # Two pairs; the later one is nearer.
        gramian = torch.eye(4)
        gramian[0, 1] = gramian[1, 0] = 0.8
        gramian[2, 3] = gramian[3, 2] = 0.9
        assert_keeps(NeighborhoodAgreement(0.5), gramian, [2, 3])

    def test_breaks_the_last_tie_by_the_lowest_rank(self) -> None:
        gramian = torch.eye(4)
        gramian[0, 2] = gramian[2, 0] = gramian[1, 3] = gramian[3, 1] = 0.9
        assert_keeps(NeighborhoodAgreement(0.5), gramian, [0, 2])

    def test_counts_voters_before_distances(self) -> None:
        # Rank 0 and 1 are copies; rank 4 has two neighbours, at the edge.
        gramian = torch.eye(5)
        gramian[0, 1] = gramian[1, 0] = 1.0
        gramian[4, 2] = gramian[2, 4] = gramian[4, 3] = gramian[3, 4] = 0.5
        assert_keeps(NeighborhoodAgreement(0.5), gramian, [2, 3, 4])

    def test_absent_ranks_neither_count_nor_are_the_centre(self) -> None:
        # Their cosine is 0, a distance of 1, which is within tau.
        gramian = torch.zeros(6, 6)
        gramian[1, 1] = gramian[4, 4] = 1.0
        gramian[1, 4] = gramian[4, 1] = -0.5
        assert_keeps(NeighborhoodAgreement(1.2), gramian, [])
        assert NeighborhoodAgreement(1.5)(gramian).tolist() == [0, 0.5, 0, 0, 0.5, 0]


class TestSequential:
    def test_never_questions_the_first_voter(self) -> None:
        gradients = agreeing_gradients(4, 300)
        gradients[0] *= -1
        assert_keeps(SequentialAgreement(0.9), gramian_of(gradients), [])
        gradients[1] *= -1  # two bad ones hold together and keep the good ones out
        assert_keeps(SequentialAgreement(0.9), gramian_of(gradients), [0, 1])

    def test_starts_from_the_first_voter_not_the_first_rank(self) -> None:
        gramian = torch.ones(4, 4)
        gramian[0, :] = gramian[:, 0] = math.nan
        assert SequentialAgreement(0.5)(gramian).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])

    def test_half_weighs_later_gradients_more(self) -> None:
        weights = SequentialAgreement(1.0, running="half")(torch.ones(4, 4))
        assert weights.tolist() == [1 / 8, 1 / 8, 1 / 4, 1 / 2]

    def test_a_running_sum_of_zero_is_at_distance_1(self) -> None:
        g = random_gradients(1, 50)
        gramian = gramian_of(torch.cat([g, -g, g]))
        assert_keeps(SequentialAgreement(2.0), gramian, [0, 1, 2])
        assert SequentialAgreement(2.0)(gramian).isfinite().all()

    def test_refuses_an_unknown_running(self) -> None:
        with pytest.raises(ValueError, match="running must be 'mean' or 'half', found 'median'"):
            SequentialAgreement(1.0, running="median")  # type: ignore[arg-type]
