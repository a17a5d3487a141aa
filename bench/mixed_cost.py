#!/usr/bin/env python3
"""Plans that spend milliseconds against plans that count activations, on a model whose layers do not cost the same.

    python bench/mixed_cost.py build/testbed.gguf [--calib book.txt] [--shares 0.67,0.5,0.33]

Makes a copy of the model in which the experts of every second layer are in Q4_0 and the others in F32, seven times as
many bytes, measures what an activation costs in each layer, and compares at equal predicted decode time: the plan by
cost against the largest plan by count, and uniform k, that take no longer. Prints divergence from the full model on
held-out text, predicted and measured milliseconds per token.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import gguf

from allocmoe_edge import Llama, Plan, metadata
from allocmoe_edge.convert import calibration, choose, costs, sensitivity
from allocmoe_edge.convert.checkpoint import Checkpoint
from allocmoe_edge.planner import allocate

N_CTX = 512


def mixed_copy(source: Path, target: Path) -> None:
    """The model with the experts of even layers in F32, of odd layers in Q4_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if "_exps." in tensor.name:
            odd = int(tensor.name.split(".")[1]) % 2
            kind = gguf.GGMLQuantizationType.Q4_0 if odd else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def largest(plan_of, cost: costs.Costs, full: tuple, limit_ms: float) -> Plan:
    """The plan of most activations, of a family by total, that is predicted to take no longer than limit_ms."""
    totals = range(sum(k > 0 for k in full), sum(full) + 1)
    return max((plan_of(t) for t in totals if cost.decode_ms(plan_of(t).expert_used_count) <= limit_ms), key=lambda p: p.budget_total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, help="UTF-8 text. Default: the model writes its own")
    parser.add_argument("--calib-tokens", type=int, default=1024)
    parser.add_argument("--shares", default="0.67,0.5,0.33", help="of the experts' milliseconds at full budget")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        path = Path(folder) / "mixed.gguf"
        mixed_copy(args.model, path)
        n_threads = multiprocessing.cpu_count()
        llm = Llama(
            str(path), n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=n_threads, n_threads_batch=n_threads, verbose=False
        )
        full = metadata.read(path).full
        with Checkpoint(Path(folder) / "profile", path) as checkpoint:
            if args.calib:
                text = calibration.from_file(llm, args.calib, args.calib_tokens, N_CTX)
            else:
                text = calibration.self_generated(llm, args.calib_tokens, N_CTX, 0, checkpoint)
            rows, _ = sensitivity.measure(llm, full, text.profile, "fast", "kl", checkpoint)
        tokens = text.held_out.ravel()
        cost = costs.measure(llm, full, tokens)
        experts_ms = cost.decode_ms(full) - cost.fixed_ms
        per_activation = sorted(set(cost.activation_ms))
        print(f"full budget {cost.decode_ms(full):.2f} ms a token, {experts_ms:.2f} of it experts; an activation costs")
        print(f"{' or '.join(f'{1000 * ms:.0f}' for ms in per_activation)} microseconds\n")
        print("| share of expert time | plan | activations | divergence (nats) | predicted ms | measured ms |")
        print("| ---: | --- | ---: | ---: | ---: | ---: |")
        for share in map(float, args.shares.split(",")):
            by_cost = allocate(rows, share * experts_ms, full, cost=cost.activation_ms)
            limit = cost.decode_ms(by_cost.expert_used_count) + 1e-9
            plans = {
                "by cost": by_cost,
                "by count": largest(lambda t: allocate(rows, t, full), cost, full, limit),
                "uniform": largest(lambda t: Plan.uniform(full, t), cost, full, limit),
            }
            found = choose.scores(llm, full, plans, text.held_out)
            runs = [{name: costs.decode_ms(llm, plan, tokens) for name, plan in plans.items()} for _ in range(9)]
            for name, plan in plans.items():
                measured = statistics.median(run[name] for run in runs)
                print(
                    f"| {share:.2f} | {name} | {plan.budget_total} | {found[name].kl:.4f} "
                    f"| {cost.decode_ms(plan.expert_used_count):.2f} | {measured:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
