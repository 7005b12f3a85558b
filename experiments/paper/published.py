"""Published numbers: top-1 accuracy in % per exit, from the paper where nothing else is named."""

TABLE_1 = {
  'MSDNet': (64.1, 67.46, 70.34, 72.38, 73.06, 73.81, 73.89),
  'GE + ISC + OFA': (64.00, 68.41, 71.86, 73.50, 74.46, 75.39, 75.96),
}
# Networks of Table 1 with one exit. Their parameters and multiply-adds are in
# tests/models/test_hydranet.py.
HYDRANETS = {
  'Hydra-Res-d1': (65.81,),
  'Hydra-Res-d2': (71.24,),
  'Hydra-Res-d3': (72.30,),
  'Hydra-Res-d4': (73.35,),
  'Hydra-Res-d5': (73.84,),
  'Hydra-Res-d6': (74.29,),
  'Hydra-Res-d7': (74.71,),
  'Hydra-Res-d9': (75.26,),
}
TABLE_2 = {
  'none': (60.09, 63.73, 67.89, 70.48, 71.81),
  'GE': (60.35, 64.38, 68.72, 70.65, 71.94),
  'ISC': (60.19, 64.72, 68.07, 70.94, 73.28),
  'OFA': (60.39, 64.20, 68.10, 70.65, 71.85),
  'GE + ISC + OFA': (60.78, 65.54, 69.98, 72.27, 73.45),
}
# Gong et al., ECCV 2024: MSDNet with 7 exits on CIFAR-100.
DEEP_FEATURE_SURGERY = (72.46, 75.64, 77.50, 78.54, 79.20, 79.45, 79.56)
TABLE_3 = {
  'none': (56.64, 65.14, 68.42, 69.77, 71.34),
  'GE': (57.08, 65.29, 69.08, 70.55, 72.14),
  'ISC': (57.03, 66.2, 69.73, 71.15, 71.65),
  'OFA': (57.15, 65.77, 68.87, 70.23, 71.39),
  'GE + ISC + OFA': (57.28, 66.22, 70.24, 71.71, 72.43),
}
