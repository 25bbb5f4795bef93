"""What the live page looks like: fonts of the system, colours, and the few lines of script that it needs."""

from __future__ import annotations

from importlib.resources import files

import gradio as gr

FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
THEME = gr.themes.Default(
    primary_hue="blue", neutral_hue="gray", font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"]
)

INTRODUCTION = """
<h1>Turn λ</h1>
<p>Two language models, a <b>reference</b> and an <b>aligned</b> one that was trained from it. λ mixes them: at 0 you
read the reference, at 1 the aligned model. <b>exact</b> runs both and mixes what they say, token by token;
<b>merged</b> is one model whose weights were mixed once. Both draw with the same random numbers, so where the texts
part, the merge is not what it stands for.</p>
"""

CSS = """
:root { --heat: 214, 40, 40; --more: 40, 110, 220; --less: 225, 130, 20; }
.dark { --heat: 255, 90, 80; --more: 90, 150, 255; --less: 240, 160, 60; }
.gradio-container { max-width: 66rem !important; margin: 0 auto; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 0; }
.soft { opacity: .7; font-size: .9rem; }
.turn input[type=number] { display: none; }
#note { min-height: 1.7rem; font-weight: 600; }
.alert { color: #b3261e; } .dark .alert { color: #ff7b72; }
#gone { position: fixed; inset: auto 0 0 0; padding: .8rem 1rem; z-index: 1000; text-align: center; font-weight: 600;
        color: #fff; background: #b3261e; } #gone[hidden] { display: none; }
.card { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .8rem 1rem; min-height: 9rem; }
.wide { overflow-x: auto; max-width: calc(100vw - 7rem); }
.wide table { border-collapse: collapse; border: 0; }
.wide :is(th, td, td *) { font-size: .76rem !important; }
.wide th, .wide td { padding: .15rem .25rem !important; text-align: left; white-space: nowrap;
                     border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.charts figure { margin: 0; }
""" + files("dera_merge.pages").joinpath("templates/play.css").read_text(encoding="utf-8")

# Says when the server is gone, or another one than the page came from.
WATCH = """
<script>
(() => {
  let mine = null;
  const banner = document.createElement('div');
  banner.id = 'gone';
  banner.setAttribute('role', 'alert');
  const tell = (text) => {
    banner.textContent = text;
    banner.hidden = !text;
    if (!banner.isConnected) document.body.append(banner);
  };
  const asked = () => fetch('gradio_api/app_id', {cache: 'no-store'}).then((answer) => answer.json());
  const look = () => asked().then(({app_id}) => {
    mine = mine || app_id;
    tell(app_id === mine ? '' : 'The server was started anew. Reload the page to go on.');
  }).catch(() => tell('The server has stopped. What you see stays; start dera-merge play again to go on.'));
  setInterval(look, 3000);
})();
</script>
"""

# A click on a token, or Enter where the keyboard is on it.
PICK = """
const pick = (event) => {
  const token = event.target.closest('[data-n]');
  if (!token) return;
  document.querySelectorAll('.tokens .chosen').forEach((other) => other.classList.remove('chosen'));
  token.classList.add('chosen');
  trigger('pick', {side: token.dataset.side, n: Number(token.dataset.n)});
};
element.addEventListener('click', pick);
element.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); pick(event); }
});
"""

# The bar of each chart follows its slider, without the server.
MOVE = """
(...lams) => document.querySelectorAll('.chart .place').forEach((bar) => {
  const at = bar.dataset, from = Number(at.from), to = Number(at.to), left = Number(at.left), right = Number(at.right);
  const value = Math.min(to, Math.max(from, Number(lams[Number(at.along)])));
  const x = left + (right - left) * (value - from) / (to - from);
  bar.setAttribute('x1', x); bar.setAttribute('x2', x);
})
"""


def download(kind: str) -> str:
    """A script that makes a file of the browser's of what the server wrote, which keeps nothing."""
    return f"""
(text) => {{
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {{type: '{"application" if kind == "json" else "text"}/{kind}'}}));
  link.download = 'dera-merge-play.{kind}';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}}
"""
