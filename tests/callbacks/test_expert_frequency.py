"""The scores of expert_frequency are the number of tokens that the router sends to an expert."""

import pytest
import torch

from prunelit.callbacks.expert_frequency import ExpertFrequency
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from tests.observed import batches_for
from tests.routed import ROUTED, sum_over_visits
from tests.tiny import tiny


@pytest.mark.filterwarnings("ignore:calibration")  # few tokens
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ROUTED)
def test_scores_equal_a_token_by_token_loop(family: str, padded: bool) -> None:
    model = tiny(family)
    batches = batches_for(model, padded)
    for index, found in enumerate(ExpertFrequency(0.2).score(PruningContext(Decoder(model), batches))):
        expected = sum_over_visits(family, model, index, batches, lambda visit: 1)
        if expected is None:
            assert found.experts is None
        else:
            assert found.experts is not None
            torch.testing.assert_close(found.experts, expected, rtol=1e-4, atol=1e-6)
