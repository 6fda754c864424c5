"""EffNystromformer: Nystromformer (Xiong et al. 2021, arXiv 2102.03902)."""
