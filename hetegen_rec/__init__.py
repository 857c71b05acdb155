"""HeteGenCTR: generative click-through-rate models with per-field difficulty, on TorchRec."""
