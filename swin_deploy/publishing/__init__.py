"""Files for other programs: model repositories, configurations, an EPContext graph, a web page."""
