"""Answers of the policy, and what the other roles say of them."""
