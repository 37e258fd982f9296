"""Check of class names."""
from typing import Dict, Optional, Sequence

__all__ = ['check_class_names']


def check_class_names(names: Optional[Sequence[str]], owner: str) -> None:
    """Check that every class has a name, and that no two classes have the same one.

    Args:
        names: Class names in the order of the class indices, or None if there are none.
        owner: What the names belong to, the first words of the message.

    Raises:
        ValueError: A name is not a string or is empty, or two classes have the same name.

    >>> check_class_names(['cat', 'dog', 'cat'], 'The model')
    Traceback (most recent call last):
    ValueError: The model has the same name for class 0 and class 2, 'cat'. Class names must be unique.
    """
    seen: Dict[str, int] = {}
    for i, name in enumerate(names or ()):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f'{owner} has {name!r} as the name of class {i}. Each class needs a name.')
        if name in seen:
            raise ValueError(
                f'{owner} has the same name for class {seen[name]} and class {i}, {name!r}. Class names must be '
                f'unique.')
        seen[name] = i
