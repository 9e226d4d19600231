"""Mistakes that type checkers find: every line that ends in `expect error`, and no other. Not run."""

import numpy as np

import fastopt

p, g = np.zeros(3, np.float32), np.ones(3, np.float32)

fastopt.Adam(np.zeros(3))  # expect error
fastopt.Adam([np.zeros(3, np.int32)])  # expect error
fastopt.Adam({"w": [1.0, 2.0]})  # expect error
fastopt.Adam({1: p})  # expect error
fastopt.Adam(1.0)  # expect error
fastopt.Adam("w")  # expect error
fastopt.Adam([("w", p)])  # expect error
fastopt.Adam([p], lr="0.1")  # expect error
fastopt.Adam([p], betas=0.9)  # expect error
fastopt.Adam([p], betas=(0.9, 0.99, 0.999))  # expect error
fastopt.Adam([p], amsgrad="yes")  # expect error
fastopt.Adam([p], momentum=0.9)  # expect error
fastopt.SGD([p], betas=(0.9, 0.99))  # expect error
fastopt.Adam([p], ema_decy=0.9)  # expect error
fastopt.Adam([p], state_dtype="int8")  # expect error
fastopt.Adam([p], copy_dtype="float32")  # expect error
fastopt.Adam([p], master=True)  # expect error
fastopt.Adam([p], backend="gpu")  # expect error
fastopt.Adam([p], n_threads="all")  # expect error
fastopt.Adamm([p])  # expect error

opt = fastopt.Adam([p])
opt.accumulate()  # expect error
opt.step([[1.0, 2.0, 3.0]])  # expect error
opt.step(["w"])  # expect error
opt.step([np.ones(3, np.int64)])  # expect error
opt.step([g], max_nrom=1.0)  # expect error
opt.step([g], max_norm="1")  # expect error
opt.step([g], skip_nonfinite="no")  # expect error
opt.step([g]).norm  # expect error
opt.step([g]).grad_norm + 1.0  # expect error
opt.zero_grad()  # expect error
opt.lr = 0.1  # expect error
opt.n_treads = 3  # expect error
opt.n_threads = "3"  # expect error
opt.ema_decay = 0.9  # expect error
opt.state.exp_avg  # expect error
opt.state[0].exp_avg  # expect error
opt.state[0]["exp_avg"].copy_to_host()  # expect error
opt.ema[0]["exp_avg"].bit_count()  # expect error
opt.update([p], [g])  # expect error
opt.update({"w": p}, {"w": g}, maxnorm=1.0)  # expect error
opt.load_state_dict("state.pt")  # expect error
opt.add_param_group([p])  # expect error

fastopt.functional.adam(p, g, p)  # expect error
fastopt.functional.adam(p, g, p, p, learning_rate=0.1)  # expect error
fastopt.functional.adam(np.zeros(3), g, p, p)  # expect error
fastopt.functional.adam(p, g, p, p, step="1")  # expect error
fastopt.functional.adamm(p, g, p, p)  # expect error
fastopt.reference.sgd([1.0], [1.0])  # expect error
fastopt.FlatBuffer([p])  # expect error
fastopt.FlatBuffer({"w": "3"})  # expect error
fastopt.FlatBuffer({"w": 3}, backend="gpu")  # expect error
fastopt.FlatBuffer({"w": 3})["w"] = "1"  # expect error
fastopt.FlatBuffer({"w": 3})["w"] = np.zeros(3)  # expect error
fastopt.set_num_threads("2")  # expect error
fastopt.cuda.ptx("adam", 90)  # expect error
fastopt.cuda.rule()  # expect error
fastopt.lr_scheduler.StepLR(p, 30)  # expect error
fastopt.lr_scheduler.LambdaLR(fastopt.SGD(p), 0.5)  # expect error
fastopt.lr_scheduler.ReduceLROnPlateau(fastopt.SGD(p)).step()  # expect error
fastopt.EarlyStopping(mode="auto")  # expect error
fastopt.EarlyStopping().step("0.5", p)  # expect error
