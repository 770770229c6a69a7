"""Instructions on the characters of a response."""

from __future__ import annotations


def no_commas(response: str) -> bool:
    """No comma, in any script."""
    return not any(mark in response for mark in ",،、，")


def no_digits(response: str) -> bool:
    """No digit: numbers are written as words."""
    return not any(character.isdigit() for character in response)


def lower_case(response: str) -> bool:
    """No capital letter, and at least one letter."""
    return response == response.lower() and response.upper() != response


def upper_case(response: str) -> bool:
    """Capital letters only, and at least one letter."""
    return response == response.upper() and response.lower() != response
