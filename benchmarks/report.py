"""``python -m benchmarks.report FILES... [--plots FOLDER]``: saved benchmarks as a Markdown table, and as plots.

FILES are what ``pytest benchmarks/ --benchmark-json=FILE`` writes, one for each device.
"""

import argparse
import json
from pathlib import Path

DIRECTIONS = ("forward", "forward+backward")
_COLUMNS = "ms | of copy | peak MiB"
# Times and peaks of memory, among the columns of both directions.
_LESS_IS_BETTER = (0, 2, 3, 5)


def main(arguments=None):
    """Prints the table of each file, and draws the plots of all together."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write two plots for each operator there")
    options = parser.parse_args(arguments)
    runs = [load(path) for path in options.files]
    print("\n".join(map(table, runs)))
    if options.plots:
        for path in plots(runs, options.plots):
            print(f"wrote {path}")


def load(path):
    """Where and how a file's benchmarks were run, and a list of them, those that ran out of memory included."""
    saved = json.loads(path.read_text())
    results = [
        {**benchmark["extra_info"], "seconds": benchmark["stats"]["median"]} for benchmark in saved["benchmarks"]
    ]
    results += saved["out_of_memory"]
    if not results:
        raise SystemExit(f"{path} holds no benchmarks")
    return {"command": saved["command"], "date": saved["datetime"][:10], "results": results}


def table(run):
    """The table of one file: a row for each rival, the best of each size in bold; floors do not compete."""
    first = run["results"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    lines = [
        f"**{first['device']}**, commit {first['commit']}, {run['date']}, {versions}. `{run['command']}`",
        "",
        f"| operator | size | by | {' | '.join(f'{direction}, {_COLUMNS}' for direction in DIRECTIONS)} |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    sizes = dict.fromkeys((result["operator"], result["size"]) for result in run["results"])
    for operator, size in sizes:
        results = [result for result in run["results"] if (result["operator"], result["size"]) == (operator, size)]
        for row in _rows(results):
            lines.append(f"| {operator} | {size} | {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def _rows(results):
    """The cells of one operator and size: the rival's name, and three for each direction."""
    found = {(result["rival"], result["direction"]): result for result in results}
    floors = {result["rival"] for result in results if result["floor"]}
    remarks = {result["rival"]: " (not judged)" for result in results if not result.get("judged", True)}
    remarks |= {rival: " (floor)" for rival in floors}
    rows = {
        rival: [cell for direction in DIRECTIONS for cell in _cells(found.get((rival, direction)))]
        for rival in dict.fromkeys(result["rival"] for result in results)
    }
    for column in _LESS_IS_BETTER:
        competing = {rival: cells[column] for rival, cells in rows.items() if rival not in floors}
        numbers = [cell for cell in competing.values() if cell[:1].isdigit()]
        best = min(numbers, key=float, default=None)
        for rival, cell in competing.items():
            if cell == best:
                rows[rival][column] = f"**{cell}**"
    for rival, cells in rows.items():
        yield [f"{rival}{remarks.get(rival, '')}", *cells]


def _cells(result):
    if result is None:
        return ["", "", ""]
    if "seconds" not in result:
        return ["out of memory", "", ""]
    share, peak = result["share_of_copy"], _mebibytes(result)
    return [
        _three_digits(result["seconds"] * 1e3),
        f"{share:.0%}" if share > 0.1 else f"{share:.1%}",
        "" if peak is None else _three_digits(peak),
    ]


def _three_digits(number):
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def _mebibytes(result):
    return None if result["peak_bytes"] is None else result["peak_bytes"] / 2**20


def plots(runs, folder):
    """Draws time and peak memory against megapixels for every operator with a series; returns the files' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [result for run in runs for result in run["results"] if result["in_series"]]
    operators = dict.fromkeys(result["operator"] for result in results)
    quantities = {
        "time": ("time, ms", lambda result: result["seconds"] * 1e3),
        "memory": ("peak memory beyond the arguments, MiB", _mebibytes),
    }
    paths = []
    for operator in operators:
        for name, (label, quantity) in quantities.items():
            paths.append(folder / f"{operator}_{name}.png")
            _plot([result for result in results if result["operator"] == operator], label, quantity, paths[-1])
    return paths


def _plot(results, label, quantity, path):
    """One panel for each direction, one line for each rival and device; a cross is where memory was not enough."""
    from matplotlib.figure import Figure  # a second to import, which those who want the table need not wait

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, len(DIRECTIONS), sharex=True, sharey=True)
    devices = dict.fromkeys(result["device"] for result in results)
    lines = dict.fromkeys((result["device"], result["rival"]) for result in results)
    sizes = sorted({result["megapixels"] for result in results})
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        for number, (device, rival) in enumerate(lines):
            mine = [r for r in results if (r["device"], r["rival"], r["direction"]) == (device, rival, direction)]
            line = sorted((r["megapixels"], quantity(r)) for r in mine if "seconds" in r and quantity(r) is not None)
            style = {"color": f"C{number % 10}", "linestyle": "--" if mine and mine[0]["floor"] else "-"}
            name = rival if len(devices) == 1 else f"{rival}, {device}"
            panel.plot(*zip(*line, strict=True) if line else ((), ()), "o", label=name, **style)
            for failed in (r["megapixels"] for r in mine if "seconds" not in r):
                # At the height of the upper edge: more than there is.
                panel.plot(failed, 1, "x", transform=panel.get_xaxis_transform(), clip_on=False, **style)
        panel.set(xscale="log", yscale="log", xlabel="megapixels", title=direction)
        panel.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{results[0]['operator']} on {', '.join(devices)}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
