"""What can go wrong while FuseChat works, brought about on purpose, again and again; see docs/reliability.md."""
