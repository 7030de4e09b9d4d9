import warnings

# conf/hydra/launcher has the launchers' own names on purpose. Here, for their workers compose before anything else of ours.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
