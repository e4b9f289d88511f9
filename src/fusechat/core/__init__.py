"""What several stages speak of, knowing none of them."""
