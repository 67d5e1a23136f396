"""Pages for people: what a run has to say, in parts, as one HTML file that needs nothing else, or as Markdown.

parts.py      what a page is made of
html.py       parts as HTML, by page.html.jinja
inline.py     a picture as SVG inside a page, in the page's colours
summary.py    a picture in one sentence, for those who do not see it
"""
