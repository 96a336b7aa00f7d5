"""Two streams in your own training loop, watched: gradients, weights, overfitting, and what to change.

    python launch/example_stream_monitoring.py --epochs 5 --samples 200

The data is synthetic: both streams carry the class, stream1 clearly and stream2 so faintly that it learns noise.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor
from ddp_streammon.train.models import mc_resnet18

CLASSES, SIZE = 10, 16


def synthetic(samples: int, seed: int) -> TensorDataset:
    """`samples` pairs of a 3-channel and a 1-channel image: their class's pattern, and noise."""
    patterns = torch.Generator().manual_seed(0)
    rgb, depth = (torch.randn(CLASSES, channels, SIZE, SIZE, generator=patterns) for channels in (3, 1))
    noise = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (samples,), generator=noise)
    stream1 = 0.5 * rgb[targets] + torch.randn(samples, 3, SIZE, SIZE, generator=noise)
    stream2 = 0.1 * depth[targets] + torch.randn(samples, 1, SIZE, SIZE, generator=noise)
    return TensorDataset(stream1, stream2, targets)


def run_epoch(model, loader, monitor=None):
    """Train (with a monitor) or validate over `loader`: mean loss, accuracy, and the first batch's gradient figures."""
    model.train(monitor is not None)
    loss_sum, correct, gradients = 0.0, 0, {}
    for number, (stream1, stream2, targets) in enumerate(loader):
        with torch.set_grad_enabled(monitor is not None):
            outputs = model(stream1, stream2)
            loss = model.criterion(outputs, targets)
        if monitor is not None:
            model.optimizer.zero_grad()
            loss.backward()
            if number == 0:  # after backward, before the optimizer's step
                gradients = monitor.compute_stream_gradients()
            model.optimizer.step()
        loss_sum += loss.item() * len(targets)
        correct += (outputs.argmax(1) == targets).sum().item()
    return loss_sum / len(loader.dataset), correct / len(loader.dataset), gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=200, help="training samples; a quarter as many for validation")
    options = parser.parse_args()
    torch.manual_seed(0)
    train_loader = DataLoader(synthetic(options.samples, seed=1), batch_size=16, shuffle=True)
    val_loader = DataLoader(synthetic(max(options.samples // 4, 1), seed=2), batch_size=16)

    # One parameter group a stream, each with its own learning rate and weight decay; the rest has the base values.
    model = mc_resnet18(num_classes=CLASSES, fusion_type="weighted", dropout_p=0.2, stem="small", width=8)
    model.compile("adamw", learning_rate=1e-3, weight_decay=1e-2, stream1_lr=5e-3, stream2_weight_decay=2e-2)
    monitor = StreamMonitor(model, model.optimizer)  # with the optimizer, recommendations know the present values
    print(monitor.inventory())

    for epoch in range(options.epochs):
        train_loss, train_acc, gradients = run_epoch(model, train_loader, monitor)
        val_loss, val_acc, _ = run_epoch(model, val_loader)
        print(f"\nEpoch {epoch + 1}: train {train_loss:.3f} ({train_acc:.1%}), val {val_loss:.3f} ({val_acc:.1%})")

        weights = monitor.compute_stream_weights()
        overfitting = monitor.compute_stream_overfitting_indicators(
            train_loss, val_loss, train_acc, val_acc, train_loader, val_loader
        )
        for name in model.stream_names:
            print(
                f"  {name}: gradient norm {gradients[f'{name}_grad_norm']:.3f}, "
                f"weight norm {weights[f'{name}_weight_norm']:.1f}; "
                f"alone, train {overfitting[f'{name}_train_acc']:.1%}, val {overfitting[f'{name}_val_acc']:.1%}, "
                f"score {overfitting[f'{name}_overfitting_score']:.2f}"
            )
        monitor.log_metrics(epoch, {**gradients, **weights, **overfitting})
        for recommendation in monitor.get_recommendations():
            print(f"  {recommendation}")

    print(f"\n{monitor.get_summary()}")
    analysis = model.analyze_pathways(val_loader, num_samples=50)
    print(f"\nPathways, over {analysis['samples_analyzed']} validation items:")
    print(f"  full model: {analysis['accuracy']['full_model']:.1%}")
    for name in model.stream_names:
        print(
            f"  {name} only: {analysis['accuracy'][f'{name}_only']:.1%} "
            f"({analysis['accuracy'][f'{name}_contribution']:.0%} of it), "
            f"mean feature norm {analysis['feature_norms'][f'{name}_mean']:.2f}"
        )


if __name__ == "__main__":
    main()
