"""EffLongformer: Longformer (Beltagy, Peters & Cohan 2020, arXiv 2004.05150)."""
