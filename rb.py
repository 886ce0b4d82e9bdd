import json,numpy as np
r=json.load(open("/tmp/h1/rb/run.json")); print([round(e["train_s"],3) for e in r["epochs"]], [round(e["auc"],4) for e in r["epochs"]], r["test"], r["best_epoch"])
from recsys_lab.evaluation.metrics import auc,logloss
import pandas as pd
p=np.load("/tmp/h1/rb/pairs.npy"); t=pd.read_csv("/tmp/h1/csv/test.csv"); m=pd.DataFrame(p,columns=["user","item","p"]).merge(t,on=["user","item"]); print(len(m),auc(m.label,m.p),logloss(m.label,m.p))
