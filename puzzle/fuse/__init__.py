"""FFN fusion (arXiv 2503.18908): neighbouring layers without attention become one layer with a wide FFN."""
