"""Adapters: how a model of one modality is read. `read(model, batch, needs) -> Outputs`."""
