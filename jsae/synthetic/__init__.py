"""Synthetic activations with known features, to measure what an SAE recovers (SynthSAEBench, arXiv 2602.14687).

world = SyntheticWorld("small")
sae = jsae.train(world, jsae.BatchTopK.Config(world.d_in, 256, k=5), jsae.TrainConfig(1_000_000))
print(jsae.recovery.scores(sae, world))
"""

from jsae.synthetic.config import PRESETS, WorldConfig
from jsae.synthetic.features import Parts
from jsae.synthetic.stages import StagesConfig, StageWorld
from jsae.synthetic.world import Samples, SyntheticWorld

__all__ = ["PRESETS", "Parts", "Samples", "StageWorld", "StagesConfig", "SyntheticWorld", "WorldConfig"]
