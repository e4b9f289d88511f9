"""`python -m fusechat`, the form that launchers such as torchrun need."""

from fusechat.commands.cli import main

main()
