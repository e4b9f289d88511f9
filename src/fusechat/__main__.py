"""`python -m fusechat`, the form that launchers such as torchrun need."""

from fusechat.cli import main

main()
