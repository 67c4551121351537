"""Write what is known about a bundle as an HTML page."""
