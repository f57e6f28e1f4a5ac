"""Options of `omni infer`, most of them about live cameras."""

from typing import Annotated

import typer

Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Windows answered at a time. [default: 8, of a live camera 1]")
]
Seconds = Annotated[
    float | None, typer.Option("--seconds", min=0, help="Leave a live camera after so long. [default: at its end]")
]
Windows = Annotated[
    int | None, typer.Option("--windows", metavar="N", min=1, help="Leave a live camera after so many answers.")
]
Patience = Annotated[
    float | None,
    typer.Option("--patience", min=0.1, help="Seconds without a picture after which it is lost. [default: 10]"),
]
Reconnect = Annotated[
    int | None,
    typer.Option("--reconnect", min=0, help="Times in a row that a lost one is tried again. [default: RTSP 3, else 0]"),
]
