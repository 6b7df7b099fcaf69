"""LAVIS's own runners as its main branch has them: the model's learning rates, and training sets by ratio."""

from __future__ import annotations

from typing import Any


def patch_optimizer_groups() -> None:
    """Let a model that has ``get_optimizer_params`` say what trains at which rate; LAVIS 1.0.2 does not ask it."""
    from lavis.runners.runner_base import RunnerBase

    stock = RunnerBase.optimizer.fget

    def optimizer(self: Any) -> Any:
        """AdamW over the model's own groups, or LAVIS's two."""
        model = self.unwrap_dist_model(self.model)
        if self._optimizer is None and hasattr(model, "get_optimizer_params"):
            from lavis_svp.runners.optimizer import build_optimizer
            from lavis_svp.runners.run_options import read_options

            self._optimizer = build_optimizer(model, read_options(self.config.run_cfg), self.config.run_cfg)
        return stock(self)

    RunnerBase.optimizer = property(optimizer)


def mix_by_ratio() -> None:
    """Let ``runner_iter`` train by ``train_dataset_ratios``; in LAVIS 1.0.2 that ends in an UnboundLocalError."""
    from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split
    from lavis.runners.runner_iter import RunnerIter

    stock = RunnerIter.dataloaders.fget

    def dataloaders(self: Any) -> dict[str, Any]:
        """The loaders by split; that of training draws a data set for each batch."""
        run = self.config.run_cfg
        ratios = run.get("train_dataset_ratios", None)
        if self._dataloaders is not None or ratios is None:
            return stock(self)
        from lavis_svp.common.options import plain
        from lavis_svp.runners.ratios import weights_of

        names = [name for name, splits in self.datasets.items() if "train" in splits]
        by_split = reorg_datasets_by_split(self.datasets)
        trained = by_split.pop("train", [])
        self.datasets = concat_datasets(by_split)
        if trained:
            self.datasets["train"] = trained
        made = self.create_loaders(
            datasets=list(self.datasets.values()),
            num_workers=run.num_workers,
            batch_sizes=[run.batch_size_train if s == "train" else run.batch_size_eval for s in self.datasets],
            is_trains=[split in self.train_splits for split in self.datasets],
            collate_fns=[
                [getattr(part, "collater", None) for part in parts] if split == "train" else parts.collater
                for split, parts in self.datasets.items()
            ],
            dataset_ratios=[float(weight) for weight in weights_of(plain(ratios), names)] if trained else None,
        )
        self._dataloaders = dict(zip(self.datasets, made, strict=True))
        return self._dataloaders

    RunnerIter.dataloaders = property(dataloaders)
