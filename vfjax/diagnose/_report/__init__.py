"""The report: findings by layer, the advice they lead to, and its sentences, figure and page."""
