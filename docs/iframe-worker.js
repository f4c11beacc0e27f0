// Material searches in a worker, which browsers refuse to pages that were opened from disk: a hidden frame stands in.
// What the plugin "offline" fetches from the network does the same.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.inside = frame.contentWindow;
      this.loaded = new Promise((loaded) => frame.addEventListener("load", loaded));
      window.addEventListener("message", ({ source, data }) => {
        if (source === this.inside) this.dispatchEvent(new MessageEvent("message", { data }));
      });
      this.inside.document.open();
      this.inside.document.write(
        `<script>postMessage = (data) => parent.postMessage(data, "*");</script><script src="${url}"></script>`,
      );
      this.inside.document.close();
    }

    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
