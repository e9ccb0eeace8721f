"""``gangline plan``: where each byte would go, from headers alone."""

from gangline.cli.options import BudgetOptions, ModelArgument
from gangline.cli.output import Output


def plan(out: Output, model: ModelArgument, budget: BudgetOptions) -> None:
    """Say whether a model fits, where its bytes would go, and how fast it would be."""
    import gangline

    found = gangline.plan(model, memory=budget.memory, precision=budget.precision, ctx_size=budget.ctx_size)
    if out.json:
        out.data(found.to_dict())
        return
    from rich.table import Table

    table = Table("what", "size", "why", title=model, title_justify="left", box=None)
    for row in found.rows_table():
        table.add_row(*(str(cell) for cell in row))
    out.show(table)
