"""Opening pages in the user's browser."""

import webbrowser


def open_page(address: str) -> None:
    """Open an address in a browser, or say that there is none."""
    if not webbrowser.open(address):
        print("no browser was found here: open the address by hand", flush=True)
