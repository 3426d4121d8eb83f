{{/*
Where the API server finds architect-manager. The caBundle is written by architect-manager, or by
cert-manager; an upgrade keeps it, because the chart never had it. Takes a list: the root, the path.
*/}}
{{- define "architect.webhookClient" -}}
{{- $root := index . 0 -}}
service:
  name: architect-manager
  namespace: {{ $root.Release.Namespace }}
  port: 443
  path: {{ index . 1 }}
{{- end }}

{{- define "architect.webhookAnnotations" -}}
{{- if .Values.certManager.enabled }}
annotations:
  cert-manager.io/inject-ca-from: {{ .Release.Namespace }}/architect-manager
{{- end }}
{{- end }}

{{/*
Conditions on pods. Only those of our runtime classes are ever asked about: an outage of
architect-manager is no other pod's business. What our components write is let through without asking
(their rights and the policies bound it), or else nobody could report or repair anything meanwhile; so
is every change that leaves our labels and annotations alone, such as the end of a finalizer.
*/}}
{{- define "architect.webhookPods" -}}
- name: our-runtime-class
  expression: has(object.spec.runtimeClassName) && object.spec.runtimeClassName in ['runc-architect', 'runsc-architect']
- name: not-by-us
  expression: >-
    !(request.userInfo.username in [
    'system:serviceaccount:{{ .Release.Namespace }}:architectd',
    'system:serviceaccount:{{ .Release.Namespace }}:architect-control-plane',
    'system:serviceaccount:{{ .Release.Namespace }}:architect-manager'])
- name: new-or-ours-changed
  expression: >-
    request.operation == 'CREATE'
    || {{ include "architect.changed" (list "object" "oldObject") }}
    || {{ include "architect.changed" (list "oldObject" "object") }}
{{- end }}

{{/* CEL: whether one object has a label or an annotation of ours that the other has not so. */}}
{{- define "architect.changed" -}}
{{- $one := index . 0 }}
{{- $other := index . 1 }}
{{- $all := list }}
{{- range list "labels" "annotations" }}
{{- $own := printf "%s.metadata.%s" $one . }}
{{- $their := printf "%s.metadata.%s" $other . }}
{{- $all = append $all (printf "(has(%s) && %s.exists(key, key.matches('^([a-z]+[.])?architect[.]loopholelabs[.]io/') && !(has(%s) && key in %s && %s[key] == %s[key])))" $own $own $their $their $their $own) }}
{{- end }}
{{- join " || " $all }}
{{- end }}
