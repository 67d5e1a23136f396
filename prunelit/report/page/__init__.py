"""Report pages: plain parts (tables, notes, figures), written as one self-contained HTML file or as Markdown.

parts.py      the parts that a page is made of
html.py       parts as HTML, with the template page.html.jinja
inline.py     a figure as SVG inside a page, in the page's colours
summary.py    a figure in one sentence, for readers who cannot see it
"""
